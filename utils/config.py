"""YAML files -> one mapping -> typed, frozen dataclasses; every mistake is an error that names its dotted path."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import ConfigError
from utils.registry import did_you_mean

T = TypeVar("T")


def load_layers(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a YAML with its chain of `base` files, put `a.b=c` overrides on top, drop the losses set to null.

    Mappings merge, lists replace. `base` is relative to the file that names it.

    Raises:
        ConfigError: unreadable or malformed file, duplicate key, circular `base`, an override without `=`,
            a null for a loss that no lower layer has.
    """
    merged = OmegaConf.create()
    for source, layer in [*_file_layers(Path(path), seen=()), *map(_override_layer, overrides)]:
        _check_dropped_losses(merged, layer, source)
        try:
            merged = typing.cast(DictConfig, OmegaConf.merge(merged, layer))
        except (OmegaConfBaseException, TypeError) as error:
            raise ConfigError(f"{source}: {_first_line(error)}") from None
    data = _plain(merged, str(path))
    if isinstance(data.get("losses"), dict):
        data["losses"] = {name: options for name, options in data["losses"].items() if options is not None}
    return data


def typed(schema: type[T], data: Mapping[str, Any], prefix: str = "") -> T:
    """`data` as an instance of the dataclass `schema`, values converted to the declared types.

    Raises:
        ConfigError: unknown key, value of the wrong type, missing value; the message begins with the dotted path.
    """
    try:
        return typing.cast(T, OmegaConf.to_object(_merge(schema, data)))
    except (OmegaConfBaseException, TypeError) as error:
        path, cause = _locate(schema, data) or ((str(getattr(error, "full_key", None) or ""),), error)
        raise ConfigError(_explain(schema, path, prefix, cause)) from None


def constructor_options(constructor: Callable[..., Any], options: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The keyword arguments for `constructor` that a YAML's `options` mean: checked, typed, defaults filled in.

    The constructor is the schema: its keyword-only parameters are what YAML may set, with their annotations and
    defaults, and those of its base class where it takes `**options` for that. `prefix` is where the options stand in
    the config.

    Raises:
        ConfigError: an option that the constructor does not take, of the wrong type, or a required one missing.
    """
    schema = _schema_of(constructor)
    chosen: Any = typed(schema, options, prefix)
    return {field.name: getattr(chosen, field.name) for field in dataclasses.fields(schema)}


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as the dicts and lists that YAML holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    """The config as YAML text that `load_layers` and `typed` read back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def _file_layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    """(file name, content) of `path` and its bases, the lowest base first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: 'base' is circular")
    try:
        layer = OmegaConf.load(path)
    except FileNotFoundError:
        named_by = f" (named as 'base' in {seen[-1]})" if seen else ""
        raise ConfigError(f"{path}: no such config file{named_by}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    base = layer.pop("base", None)
    if base is None:
        return [(str(path), layer)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' must be the name of one file")
    return [*_file_layers(path.parent / base, (*seen, path.resolve())), (str(path), layer)]


def _override_layer(text: str) -> tuple[str, DictConfig]:
    key, equals, _ = text.partition("=")
    source = f"--set {text}"
    if not equals or not key.strip("."):
        raise ConfigError(f"{source}: write it as key.subkey=value")
    try:
        return source, OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source}: {_yaml_problem(error)}") from None


def _check_dropped_losses(merged: DictConfig, layer: DictConfig, source: str) -> None:
    losses, below = layer.get("losses"), merged.get("losses") or {}
    if not isinstance(losses, DictConfig):
        return
    present = [name for name in below if below[name] is not None]
    for name in map(str, losses):
        if losses[name] is None and name not in present:
            raise ConfigError(
                f"losses.{name}: null drops an inherited loss, but there is none of this name "
                f"(the config has {', '.join(present) or 'no losses'}); to add it write '{name}: {{}}' [{source}]"
            )


def _plain(config: DictConfig, source: str) -> dict[str, Any]:
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None


def _merge(schema: type, data: Mapping[str, Any]) -> Any:
    return OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(data)))


def _locate(
    schema: type, data: Mapping[str, Any], above: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], Exception] | None:
    """The path of the smallest piece of `data` that does not fit `schema`, and why (OmegaConf does not always say)."""
    for key, value in data.items():
        path = (*above, str(key))
        piece: Any = value
        for name in reversed(path):
            piece = {name: piece}
        try:
            _merge(schema, piece)
        except (OmegaConfBaseException, TypeError) as error:
            deeper = _locate(schema, value, path) if isinstance(value, Mapping) else None
            return deeper or (path, error)
    return None


def _explain(schema: type, path: tuple[str, ...], prefix: str, error: Exception) -> str:
    dotted = prefix
    for name in path:
        dotted = f"{dotted}.{name}" if dotted else name
        known = [field.name for field in dataclasses.fields(schema)]
        if name not in known:
            return f"{dotted}: unknown key; {did_you_mean(name, known)}"
        hint = typing.get_type_hints(schema)[name]
        if not dataclasses.is_dataclass(hint):
            break
        schema = typing.cast(type, hint)
    return f"{'.'.join(part for part in (prefix, *path) if part)}: {_first_line(error)}"


def _schema_of(constructor: Callable[..., Any]) -> type:
    """A dataclass with one field for each keyword-only parameter of `constructor`, and of those that it hands on to."""
    fields: dict[str, Any] = {}
    for target in _targets(constructor):
        hints = typing.get_type_hints(target)
        for parameter in inspect.signature(target).parameters.values():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            default = dataclasses.field(default="???")  # OmegaConf's mark of a value that must be given
            if parameter.default is not inspect.Parameter.empty:
                default = dataclasses.field(default_factory=functools.partial(_same, parameter.default))
            fields.setdefault(parameter.name, (parameter.name, hints.get(parameter.name, Any), default))
    name = getattr(constructor, "__name__", "Options")
    return dataclasses.make_dataclass(name, fields.values(), frozen=True)


def _targets(constructor: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The function; or a class's `__init__`, and while these take `**options` for it, that of the next base class."""
    if not inspect.isclass(constructor):
        yield constructor
        return
    for owner in constructor.__mro__:
        if "__init__" in vars(owner):
            target = vars(owner)["__init__"]
            yield target
            kinds = [parameter.kind for parameter in inspect.signature(target).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return


def _same(value: T) -> T:
    return value


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _yaml_problem(error: Exception) -> str:
    """What is wrong and on which line, of a YAML error, in one line."""
    if "tag:yaml.org,2002:python/" in str(error):
        return (
            "it would build Python objects, which is refused; if it is the configs.yaml of a published model, "
            "take our YAML of that method and give test.py its checkpoint with --weights"
        )
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return _first_line(error)
