"""Reference of all config options: text for `train.py --help-config`, and the page docs/configuration.md."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from configs import schema
from datasets.transforms import AUGMENTATIONS
from model.encoders import ENCODERS
from model.objectives import OBJECTIVES
from processor.trackers import TRACKERS
from solver.schedule import SCHEDULES
from utils.config import to_plain
from utils.errors import ConfigError
from utils.options import REQUIRED, option_of, schema_of, walk
from utils.registry import Registry, did_you_mean

INTRODUCTION = """\
# Configuration

All options of a config, with type, default and bounds. Options without a default must be given. This page is generated:
`python -m tools.write_configuration_page` writes it, and `train.py --help-config KEY` prints a part of it, for instance
`--help-config losses.mlm` or `--help-config train`.

A config is a chain of YAML files (`base: other.yaml`). Mappings merge with those of the base, lists replace them, and
null drops an inherited loss. `--set a.b=c` wins over files. Components that are chosen by name take the options of
their own section only; null drops an inherited option of another encoder or schedule.
"""


class Row(NamedTuple):
    """One option."""

    path: str
    type: str  # and bounds
    default: str
    help: str


class Section(NamedTuple):
    """The options below one key, or of one component."""

    key: str
    title: str
    description: str
    rows: list[Row]


def config_help(key: str = "") -> str:
    """Describe all options, those below `key`, or one option; raises `ConfigError` for an unknown key."""
    chosen = list(sections())
    if key:
        below = [section for section in chosen if section.key == key or section.key.startswith(f"{key}.")]
        single = [
            section._replace(rows=[row for row in section.rows if row.path == key or row.path.startswith(f"{key}.")])
            for section in chosen
        ]
        known = {section.key for section in chosen} | {row.path for section in chosen for row in section.rows}
        chosen = below or [section for section in single if section.rows]
        if not chosen:
            raise ConfigError(f"--help-config: unknown key '{key}'; {did_you_mean(key, sorted(known))}")
    return "\n\n".join(_as_text(section) for section in chosen)


def configuration_page() -> str:
    """The Markdown of docs/configuration.md."""
    return "\n".join([INTRODUCTION, *(_as_markdown(section) for section in sections())])


def sections() -> Iterator[Section]:
    """All sections, in the order of the page."""
    fields = typing.get_type_hints(schema.Config)
    name = next(row for row in _rows(schema.Config, "") if row.path == "name")
    yield Section("name", "name", "Name of the experiment.", [name])
    for key in ("data", "init", "teacher", "solver", "train", "eval"):
        yield Section(key, key, _summary(fields[key]), _rows(fields[key], key))
        if key == "solver":
            yield Section("solver.rules", "solver.rules", _summary(schema.Rule), _rows(schema.Rule, "solver.rules[]"))
            yield from _components(SCHEDULES, "solver.schedule", "solver.schedule: {{name: {}}}", "solver.schedule")
        if key == "data":
            yield from _components(AUGMENTATIONS, "data.image_aug", "data.image_aug: [{}]", "{}")
        if key == "train":
            yield from _components(TRACKERS, "train.trackers", "train.trackers: [{}]", "{}")
    yield from _components(ENCODERS, "model", "model: {{name: {}}}", "model")
    yield from _components(OBJECTIVES, "losses", "losses: {{{}: ...}}", "losses.{}")


def _components(registry: Registry[Any], key: str, title: str, prefix: str) -> Iterator[Section]:
    for name in registry:
        component: Callable[..., Any] = registry.get(name, key)
        rows = _rows(schema_of(component), prefix.format(name))
        yield Section(f"{key}.{name}", title.format(name), _summary(component), rows)


def _rows(options: type, prefix: str) -> list[Row]:
    rows = []
    for path, field, hint in walk(options, prefix):
        declared = option_of(field)
        type_name = ", ".join(filter(None, (_type_name(hint), declared.bounds())))
        rows.append(Row(path, type_name, _default(field), declared.help))
    return rows


def _summary(component: Any) -> str:
    """The docstring up to its first section."""
    lines = inspect.cleandoc(component.__doc__ or "").partition("\nArgs:")[0].partition("\nRaises:")[0]
    return " ".join(lines.split())


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == REQUIRED:
        return "required"
    return _as_yaml(to_plain(value))


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_yaml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(value)


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join([", ".join(map(str, arguments[:-1])), str(arguments[-1])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"{len(arguments)} x {_type_name(arguments[0])}"
    if origin is list:
        return "list" if arguments[0] is Any else f"list of {_type_name(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return {int: "int", float: "float", bool: "bool", str: "text", Any: "any", type(None): "null"}.get(hint, str(hint))


def _as_text(section: Section) -> str:
    lines = [section.title, f"  {section.description}"]
    width = max((len(row.path) for row in section.rows), default=0)
    for row in section.rows:
        lines.append(f"  {row.path:<{width}}  {row.type}, default {row.default}")
        lines.append(f"  {'':<{width}}    {row.help}")
    return "\n".join(lines)


def _as_markdown(section: Section) -> str:
    rows: Iterable[str] = (
        f"| `{row.path}` | {row.type} | `{row.default}` | {row.help} |".replace(" | `` |", " | |")
        for row in section.rows
    )
    table = ["| option | type | default | help |", "|---|---|---|---|", *rows] if section.rows else ["No options."]
    return "\n".join([f"## {section.title}", "", section.description, "", *table, ""])
