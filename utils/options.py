"""Options that YAML may set: types, bounds and help, from dataclass fields and from constructors."""

import copy
import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from utils.errors import ConfigError

REQUIRED = "???"  # default of an option that must be given
LARGEST = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Option:
    """Bounds and help of one option. Bounds hold for every number of a list."""

    help: str = ""
    ge: float | None = None  # greater than or equal to
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    ascending: bool = False  # no number of a list is below the one before
    resumable: bool = False  # may change with --resume, because it does not make another experiment
    path: bool = False  # file or folder, in which `~` and `$HOME` are expanded
    deferred: bool = False  # options of components, which keep their spelling until the constructor's types are known

    def problem(self, value: float) -> str | None:
        """Reason why a number is out of bounds; None if it is not."""
        if not math.isfinite(value):
            return "must be a finite number"
        if abs(value) > LARGEST:
            return "must be between -2^63 and 2^63"
        if (self.ge is not None and value < self.ge) or (self.gt is not None and value <= self.gt):
            return f"must be {self.bounds()}"
        if (self.le is not None and value > self.le) or (self.lt is not None and value >= self.lt):
            return f"must be {self.bounds()}"
        return None

    def bounds(self) -> str:
        """`at least 0 and below 1`; empty without bounds."""
        if self.ge is not None and self.le is not None:
            return f"from {self.ge:,} to {self.le:,}"
        words = ((self.ge, "at least"), (self.gt, "above"), (self.le, "at most"), (self.lt, "below"))
        return " and ".join(f"{word} {bound:,}" for bound, word in words if bound is not None)


def option(default: Any, **settings: Any) -> Any:
    """A dataclass field with this default; `settings` are the fields of `Option`."""
    metadata = {"option": Option(**settings)}
    if default.__hash__ is None:  # lists, dicts and dataclasses that are not frozen
        return dataclasses.field(default_factory=functools.partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_of(field: "dataclasses.Field[Any]") -> Option:
    """The bounds and help of a dataclass field."""
    found: Option = field.metadata.get("option", Option())
    return found


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """(dotted path, field, type) of every option of a dataclass, those of nested dataclasses included."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        path, hint = f"{prefix}.{field.name}" if prefix else field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from walk(typing.cast(type, hint), path)
        else:
            yield path, field, hint


def schema_of(constructor: Callable[..., Any], *more: tuple[str, Any, Any]) -> type[Any]:
    """A dataclass with one field per keyword-only parameter of a constructor or function.

    Bounds come from annotations such as `Annotated[float, Option(gt=0)]`, help comes from the `Args:` of the docstring.
    A class that takes `**options` adds the parameters of its base class, a function those of the function it wraps.

    Args:
        constructor: class or function.
        more: further fields (name, type, default).
    """
    fields: dict[str, Any] = {field[0]: field for field in more}
    for target, docstring in _targets(constructor):
        hints, described = typing.get_type_hints(target, include_extras=True), argument_help(docstring)
        for parameter in inspect.signature(target, follow_wrapped=False).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in fields:
                hint = hints.get(parameter.name, Any)
                fields[parameter.name] = _field(parameter, hint, described.get(parameter.name, ""))
    name = getattr(constructor, "__name__", "Options")
    return dataclasses.make_dataclass(name, fields.values(), frozen=True)


def _field(parameter: inspect.Parameter, hint: Any, described: str) -> tuple[str, Any, Any]:
    """Name, type and dataclass field of a keyword-only parameter."""
    declared = Option()
    if typing.get_origin(hint) is typing.Annotated:
        declared = next((extra for extra in hint.__metadata__ if isinstance(extra, Option)), declared)
        hint = hint.__origin__
    if not declared.help:
        declared = dataclasses.replace(declared, help=described)
    metadata = {"option": declared}
    if parameter.default is inspect.Parameter.empty:
        return parameter.name, hint, dataclasses.field(default=REQUIRED, metadata=metadata)
    default = dataclasses.field(default_factory=functools.partial(_same, parameter.default), metadata=metadata)
    return parameter.name, hint, default


def _targets(constructor: Callable[..., Any]) -> Iterator[tuple[Callable[..., Any], str]]:
    """Functions whose keyword-only parameters a constructor accepts, with their docstrings."""
    if inspect.isclass(constructor):
        chain = [(vars(one)["__init__"], one.__doc__) for one in constructor.__mro__ if "__init__" in vars(one)]
    else:
        chain = [(constructor, constructor.__doc__)]
        while (wrapped := getattr(chain[-1][0], "__wrapped__", None)) is not None:
            chain.append((wrapped, wrapped.__doc__))
    for target, docstring in chain:
        yield target, docstring or ""
        kinds = [parameter.kind for parameter in inspect.signature(target, follow_wrapped=False).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return


def argument_help(docstring: str) -> dict[str, str]:
    """Name -> description of each entry in the `Args:` section of a docstring, in one line."""
    _, _, section = inspect.cleandoc(docstring).partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return {name: text.removesuffix(".") for name, text in found.items()}


def check_bounds(options: Any, prefix: str = "") -> None:
    """Raise `ConfigError` for a number of a dataclass that is not finite or out of its bounds."""
    for field in dataclasses.fields(options):
        path = f"{prefix}.{field.name}" if prefix else field.name
        _check_value(getattr(options, field.name), option_of(field), path)


def _check_value(value: Any, bounds: Option, path: str) -> None:
    if dataclasses.is_dataclass(value):
        check_bounds(value, path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(item, Option(), f"{path}.{key}")
    elif isinstance(value, list | tuple):
        if bounds.ascending and list(value) != sorted(value):
            raise ConfigError(f"{path}: must be in ascending order, got {list(value)}")
        for number, item in enumerate(value):
            _check_value(item, bounds, f"{path}[{number}]" if dataclasses.is_dataclass(item) else path)
    elif isinstance(value, int | float) and not isinstance(value, bool) and (problem := bounds.problem(value)):
        raise ConfigError(f"{path}: {problem}, got {value}")


def _same(value: Any) -> Any:
    return value
