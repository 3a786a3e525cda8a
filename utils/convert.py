"""Plain values of YAML -> values of declared types. Every error names the dotted path and the type in plain words."""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from utils.errors import ConfigError
from utils.options import REQUIRED, Option, option_of, walk
from utils.paths import expanded
from utils.registry import did_you_mean, listed, nearest
from utils.yaml_text import Plain, encodable, meaning, read_yaml, settled, spelling

UNIONS = (typing.Union, types.UnionType)
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null", list: "a list"}
QUOTE_EACH = "; quote each text, as in ['a', 'b']"
MOST_SHOWN = 80  # characters of a value in a message


def convert_fields(schema: type, data: Any, path: str, defaults: Any = None) -> Any:
    """An instance of the dataclass `schema`.

    Args:
        schema: dataclass with the declared types and defaults.
        data: mapping of some fields to plain values.
        path: dotted path of `data` in the config.
        defaults: instance with the values of the other fields; None takes the defaults of `schema`.

    Raises:
        ConfigError: unknown key, value of the wrong type, missing value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: must be a mapping of options, got {shown(data)}")
    hints, fields = typing.get_type_hints(schema), {field.name: field for field in dataclasses.fields(schema)}
    values = {name: _default(field) if defaults is None else getattr(defaults, name) for name, field in fields.items()}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ConfigError(f"{shortened(where)}: unknown key; {_near(str(key), schema)}")
        values[key] = convert(value, hints[key], where, option_of(fields[key]), values[key])
    for name, value in values.items():
        if isinstance(value, str) and value == REQUIRED:
            raise ConfigError(f"{path}.{name}: must be set".removeprefix("."))
    return schema(**values)


def convert(value: Any, hint: Any, path: str, declared: Option, default: Any = None) -> Any:
    """The value as an instance of the type `hint`.

    Args:
        value: plain value.
        hint: declared type.
        path: dotted path of the value in the config.
        declared: declaration of the option.
        default: value in place of this one; mappings are merged with it.

    Raises:
        ConfigError: the value does not fit the type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value if declared.deferred else settled(value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return convert_fields(hint, value, path, default if isinstance(default, hint) else None)
    if origin in UNIONS:
        return _convert_union(value, hint, path, declared)
    if origin is dict and isinstance(value, Mapping):
        for key, item in value.items():
            if typing.get_origin(arguments[1]) is dict and not isinstance(item, Mapping):
                raise ConfigError(f"{path}.{key}: must be a mapping of options, got {shown(item)}; write {{}} for none")
        given = {key: convert(item, arguments[1], f"{path}.{key}", declared) for key, item in value.items()}
        return {**default, **given} if isinstance(default, Mapping) else given
    if origin in (list, tuple) and (entries := _items(value, origin)) is not None:
        kinds = arguments if origin is tuple else arguments * len(entries)
        if len(kinds) == len(entries):
            pairs = zip(entries, kinds, strict=True)
            return origin(convert(item, kind, f"{path}[{n}]", declared) for n, (item, kind) in enumerate(pairs))
    if origin is Literal and (text := _scalar(value, str)) in arguments:
        return text
    scalar = _scalar(value, hint)
    if scalar is None:
        raise ConfigError(f"{path}: must be {in_words(hint)}, got {shown(value)}{_fix(value, hint)}")
    if isinstance(scalar, str) and "\0" in scalar:
        raise ConfigError(f"{path}: must be a text without null bytes, got {shown(value)}")
    if not declared.path or not isinstance(scalar, str):
        return scalar
    if not encodable(text := expanded(scalar)):  # of a home folder, for instance
        raise ConfigError(f"{path}: must be UTF-8, got {text!r}; rename the folder")
    return text


def in_words(hint: Any) -> str:
    """Description of a type for a message, such as `a list of 2 integers`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return " or ".join(in_words(argument) for argument in arguments)
    if origin is Literal:
        return f"one of {listed(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)} {in_words(arguments[0]).split()[-1]}s"
    return "a mapping of options" if origin is dict else WORDS.get(origin or hint, str(hint))


def _near(key: str, schema: type) -> str:
    """The key that was meant: one of the schema, or the same key in one of its sections."""
    elsewhere = [path for path, *_ in walk(schema) if path.endswith(f".{key}")]
    return (
        f"did you mean '{elsewhere[0]}'?"
        if elsewhere
        else did_you_mean(key, [f.name for f in dataclasses.fields(schema)])
    )


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _convert_union(value: Any, hint: Any, path: str, declared: Option) -> Any:
    kinds = typing.get_args(hint)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        try:
            return convert(value, kind, path, declared)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: must be {in_words(hint)}, got {shown(value)}{_fix(value, hint)}")


def _items(value: Any, kind: type) -> list[Any] | None:
    """The items of a list, also of one that is written without brackets; None for something else.

    `a,b` reads as `[a,b]`, and a single text or number as a list of one. Tuples hold numbers alone, so `384x128` and
    `(384, 128)` are two numbers.
    """
    if isinstance(value, list | tuple):
        return list(value)
    if kind is tuple and isinstance(value, str):
        return [settled(Plain(item)) for item in re.split(r"\s*[,x]\s*|\s+", value.strip("() "))]
    if isinstance(value, str) and "," in value:
        try:
            given = read_yaml(f"[{value}]")
        except yaml.YAMLError:  # of a regular expression, for instance
            return None
        return given if isinstance(given, list) else None
    return [value] if isinstance(value, str | bool | int | float) else None


def _scalar(value: Any, hint: Any) -> Any:
    """The value as a text, truth value or number; None if it is something else."""
    if hint is str:
        return (
            str(value) if isinstance(value, str) else spelling(value) if isinstance(value, bool | int | float) else None
        )
    value = meaning(value) if isinstance(value, str) else value
    if hint is bool or isinstance(value, bool):
        return value if hint is bool and isinstance(value, bool) else None
    if hint is float and isinstance(value, int | float):
        return float(value)
    return value if hint is int and isinstance(value, int) else None


def fits(value: Any, kind: type) -> bool:
    """True for a value of a scalar type as it stands; an integer is a number, and a truth value is neither."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) <= (kind is bool)


def shown(value: Any) -> str:
    """A value for a message, as YAML spells it."""
    if isinstance(value, Plain):
        return shortened(str(value))
    return shortened("null" if value is None else spelling(value) if isinstance(value, bool) else repr(settled(value)))


def shortened(text: str) -> str:
    """A text for a message, in one line of at most `MOST_SHOWN` characters."""
    line = " ".join(text[: MOST_SHOWN + 1].splitlines())
    return line if len(text) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}..."


def _fix(value: Any, hint: Any) -> str:
    """The remedy for a frequent slip, to end the message with."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    forms = {typing.get_origin(kind): typing.get_args(kind) for kind in kinds}
    if value is None and str in kinds:
        return "; quote a text that reads null or ~"
    if tuple in forms:
        return f"; write them with commas, such as {','.join('1234'[: len(forms[tuple])])}"
    if list in forms:
        return (
            "; write [] for none"
            if value is None
            else f"; write [{shown(value)}]"
            if isinstance(value, Mapping)
            else QUOTE_EACH
        )
    if dict in forms and value and isinstance(value, str | list):
        names = [str(name) for name in (re.split(r"[+,\s]+", value) if isinstance(value, str) else value)]
        several = typing.get_origin(forms[dict][1]) is dict
        return (
            f"; write {{{shortened(', '.join(f'{name}: {{}}' for name in names) if several else f'name: {names[0]}')}}}"
        )
    if Literal in forms and (near := nearest(str(value), map(str, forms[Literal]))):
        return f"; did you mean '{near}'?"
    if isinstance(value, str) and {int, float} & set(kinds) and value.lstrip("+-")[:1].isdigit():
        return "; write decimal digits" + (", such as 1000" if int in kinds else ", such as 0.5 or 1e-4")
    return ""
