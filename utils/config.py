"""YAML files -> one mapping -> typed, frozen dataclasses. Every error names its dotted path."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from utils.convert import convert_fields, shortened
from utils.errors import ConfigError
from utils.options import check_bounds, schema_of
from utils.paths import expand, in_full, why_not_a_file
from utils.registry import Registry, did_you_mean, listed, nearest
from utils.yaml_text import MOST_LEVELS, read_yaml, settled, write_yaml

T = TypeVar("T")
SHIPPED = Path(__file__).resolve().parent.parent / "configs"
MOST_BASES = 20  # files that a config is based on, one on another


def load_layers(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a YAML with its chain of `base` files, apply `a.b=c` overrides, drop losses that are null.

    Mappings merge, lists replace. `base` is relative to the file that names it.

    Raises:
        ConfigError: unreadable or malformed file, duplicate key, circular `base`, override without `=`, or null for a
            loss that no lower layer has.
    """
    data: dict[str, Any] = {}
    for source, layer in [*_file_layers(expand(path), seen=()), *map(_override_layer, overrides)]:
        _check_dropped_losses(data, layer, source)
        data = _merged(data, layer)
    if isinstance(data.get("losses"), dict):
        data["losses"] = {name: options for name, options in data["losses"].items() if options is not None}
    return data


def typed(schema: type[T], data: Mapping[str, Any], prefix: str = "") -> T:
    """Convert `data` to an instance of the dataclass `schema`.

    Args:
        schema: dataclass with the declared types, bounds and defaults.
        data: plain values.
        prefix: dotted path of `data` in the config, for error messages.

    Raises:
        ConfigError: unknown key, value of the wrong type or out of bounds, missing value.
    """
    options = cast(T, convert_fields(schema, data, prefix))
    check_bounds(options, prefix)
    return options


def constructor_options(constructor: Callable[..., Any], options: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The keyword arguments for `constructor`: checked, typed, defaults filled in.

    The constructor is the schema: its keyword-only parameters are what YAML may set, with their annotations and
    defaults (see `schema_of`).

    Args:
        constructor: class or function.
        options: plain values from YAML.
        prefix: dotted path of `options` in the config, for error messages.

    Raises:
        ConfigError: as `typed`.
    """
    return _as_dict(typed(schema_of(constructor), options, prefix))


def component_options(
    registry: Registry[Any], options: Mapping[str, Any], path: str, default: str | None = None
) -> dict[str, Any]:
    """The options of a component that the key `name` chooses, `name` included: checked, typed, defaults filled in.

    Null drops an option that the component does not have, which it may inherit from a config of another component.

    Args:
        registry: components that `name` may choose.
        options: plain values from YAML.
        path: dotted path of `options` in the config, for error messages.
        default: component to take without `name`.

    Raises:
        ConfigError: no or unknown name, or as `typed`.
    """
    name = options.get("name", default)
    if not isinstance(name, str):
        raise ConfigError(f"{path}.name: must be set, got {to_plain(name)}; {did_you_mean('', registry)}")
    schema = schema_of(registry.get(name, f"{path}.name"), ("name", str, name))
    known = [field.name for field in dataclasses.fields(schema)]
    for key in options:
        if key not in known and options[key] is not None:
            near = did_you_mean(str(key), known)
            raise ConfigError(f"{path}.{key}: {name} has no such option (null drops an inherited one); {near}")
    return _as_dict(typed(schema, {key: value for key, value in options.items() if key in known}, path))


def _as_dict(options: Any) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def named_options(entries: Iterable[Any], registry: Registry[Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and checked options of list entries `name` or `{name: {option: value}}`.

    Args:
        entries: list from YAML.
        registry: components that the names refer to.
        path: dotted path of the list in the config, for error messages.

    Raises:
        ConfigError: an entry of another form, an unknown name, a name that occurs twice, or as `typed`.
    """
    chosen: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        named = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(named, Mapping) or len(named) != 1:
            raise ConfigError(f"{path}: entries must be a name or {{name: options}}, got {entry!r}")
        ((name, options),) = named.items()
        component = registry.get(str(name), path)
        if not isinstance(options, Mapping):
            raise ConfigError(f"{path}.{name}: options must be a mapping, got {options!r}")
        if name in dict(chosen):
            raise ConfigError(f"{path}: '{name}' must occur once, got it twice")
        chosen.append((str(name), constructor_options(component, options, f"{path}.{name}")))
    return chosen


def to_plain(value: Any) -> Any:
    """Convert dataclasses, tuples and mappings to the dicts and lists that YAML holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else settled(value)


def to_yaml(config: Any) -> str:
    """The config as YAML text; `load_layers` and `typed` read it back to an equal object."""
    return write_yaml(to_plain(config))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all values in nested mappings except the mappings themselves."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: (below[key], value) for key, value in above.items() if key in below}
    nested = {key: _merged(*pair) for key, pair in both.items() if all(isinstance(one, dict) for one in pair)}
    return {**below, **above, **nested}


def _file_layers(path: Path, seen: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(file name, content) of `path` and its bases, the lowest base first."""
    if os.path.realpath(path) in seen:
        raise ConfigError(f"{path}: 'base' is circular")
    if len(seen) == MOST_BASES:
        raise ConfigError(f"{path}: 'base' must lead through at most {MOST_BASES} files, got more")
    if kind := why_not_a_file(path):
        raise ConfigError(f"{path}: must be a YAML file, got {kind}")
    try:
        layer = read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        named_by = f" (named as 'base' in {seen[-1]})" if seen else ""
        raise ConfigError(f"{in_full(path)}: no such config file{named_by}{_near_file(path)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {yaml_problem(error)}") from None
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: a config must be a mapping of keys to values")
    base = layer.pop("base", None)
    if base is None:
        return [(str(path), layer)]
    if not isinstance(base, str) or not base.isprintable():  # null bytes and lone surrogates
        raise ConfigError(f"{path}: 'base' must be the name of one file, got {shortened(repr(base))}")
    return [*_file_layers(path.parent / expand(base), (*seen, os.path.realpath(path))), (str(path), layer)]


def _near_file(path: Path) -> str:
    """Remedy for a config file that is missing: the nearest one of its folder or of the configs that are shipped."""
    shipped = SHIPPED.relative_to(Path.cwd()) if SHIPPED.is_relative_to(Path.cwd()) else SHIPPED
    for folder in (path.parent, shipped):
        found = {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder.is_dir() else {}
        if near := nearest(path.stem, found):
            return f"; did you mean '{found[near]}'?"
    return f"; choose from {listed(found, path.stem)} in {shipped}"


def _override_layer(text: str) -> tuple[str, dict[str, Any]]:
    key, equals, value = text.partition("=")
    source, names = f"--set {shortened(text)}", key.split(".")
    if not equals or not all(names) or len(names) > MOST_LEVELS:
        raise ConfigError(f"{source}: must have the form key.subkey=value, without spaces around '='")
    try:
        layer = read_yaml(value)
    except yaml.YAMLError as error:
        quoted = f"quote the option in the shell, as in --set '{shortened(key)}=[1, 2]'"
        raise ConfigError(f"{source}: {yaml_problem(error)}; {quoted}") from None
    for name in reversed(names):
        layer = {name: layer}
    return source, layer


def _check_dropped_losses(below: Mapping[str, Any], layer: Mapping[str, Any], source: str) -> None:
    losses, inherited = layer.get("losses"), below.get("losses")
    if not isinstance(losses, dict):
        return
    present = (
        [name for name, options in inherited.items() if options is not None] if isinstance(inherited, dict) else []
    )
    for name in losses:
        if losses[name] is None and name not in present:
            raise ConfigError(
                f"losses.{name}: null drops an inherited loss, got null for one that is not inherited "
                f"(the config has {', '.join(present) or 'no losses'}); write '{name}: {{}}' to add it [{source}]"
            )


def yaml_problem(error: Exception) -> str:
    """Problem and line of a YAML error, in one line."""
    if "tag:yaml.org,2002:python/" in str(error):
        return (
            "refused, because it would build Python objects; if it is the configs.yaml of a published model, use our "
            "YAML of that method and pass the checkpoint to test.py with --weights"
        )
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return str(error).split("\n")[0]
