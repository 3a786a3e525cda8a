"""YAML text <-> plain values. A scalar keeps its spelling where its value would lose it."""

import re
from typing import Any, ClassVar

import yaml

NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {name: value for value in (True, False) for name in (f"{value}", f"{value}".lower(), f"{value}".upper())}
MOST_LEVELS, MOST_VALUES = 50, 100_000  # of a document; an alias counts as all that it repeats
MOST_DIGITS = 300  # of an integer, which fits a float then
INTEGER = re.compile("[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Plain(str):
    """A null, truth value or number that is spelt unusually, such as True, 3.10 or 1e5, and means a text elsewhere."""


def read_yaml(text: str) -> Any:
    """Dicts, lists and scalars of a YAML document. Keys are texts.

    Only the plain spellings of YAML 1.2 are truth values and numbers; `yes`, `007`, `0o17`, `1_000` and `12:30` are
    texts. `Plain` marks those whose spelling differs from what Python prints.

    Raises:
        yaml.YAMLError: malformed text, a duplicate key, a tag such as `!!python/object`, too many levels or values.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError(f"too many levels, more than {MOST_LEVELS}") from None


def write_yaml(value: Any) -> str:
    """The YAML text of dicts, lists and scalars; `read_yaml` reads it back to an equal value."""
    return str(yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


def meaning(text: str) -> Any:
    """The null, truth value or number that a text spells in YAML 1.2, or the text itself."""
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INTEGER.fullmatch(text) and len(text) <= MOST_DIGITS:
        return int(text)
    return float(re.sub(r"\.(?=[iInN])", "", text)) if FLOAT.fullmatch(text) else text


def spelling(value: Any) -> str:
    """The usual spelling of a truth value or number."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def settled(value: Any) -> Any:
    """The value with the meaning of each `Plain` scalar in it."""
    if isinstance(value, Plain):
        return meaning(value)
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items()}
    return [settled(item) for item in value] if isinstance(value, list) else value


def encodable(text: str) -> bool:
    """False for a text with half a surrogate pair, which no file in UTF-8 can hold."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


class _Loader(yaml.SafeLoader):
    """The loader without YAML 1.1's types; merge keys (`<<`) stay."""

    yaml_constructors: ClassVar = {None: yaml.SafeLoader.construct_undefined}

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        values, levels = (0, 0) if node is None else _extent(node, {})
        if levels > MOST_LEVELS:
            raise yaml.YAMLError(f"too many levels, more than {MOST_LEVELS}")
        if values > MOST_VALUES:
            raise yaml.YAMLError(f"too many values, more than {MOST_VALUES:,} with those that aliases repeat")
        return node


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of values and levels of a node, with its aliases written out; `known` holds those of other nodes."""
    if id(node) not in known:
        known[id(node)] = (1, 1)  # of a node within itself, which the constructor refuses
        pairs = isinstance(node, yaml.MappingNode)
        inner = (
            []
            if isinstance(node, yaml.ScalarNode)
            else [one for pair in node.value for one in pair]
            if pairs
            else node.value
        )
        extents = [_extent(one, known) for one in inner]
        known[id(node)] = (
            1 + sum(values for values, _ in extents),
            1 + max((levels for _, levels in extents), default=0),
        )
    return known[id(node)]


_Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise _misfit("text", node)
    if not encodable(node.value):
        raise yaml.constructor.ConstructorError(None, None, f"not a text: {node.value!r}", node.start_mark)
    if node.style is not None:  # quoted
        return node.value
    value = meaning(node.value)
    return Plain(node.value) if value is not None and spelling(value) != node.value else value


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _misfit("mapping", node)
    given: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "keys must be texts", key.start_mark)
        if key.value in given:
            raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
        given.add(key.value)
    loader.flatten_mapping(node)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _misfit(tag: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, f"expected a {tag}", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


class _Dumper(yaml.SafeDumper):
    """The dumper that quotes what either version of YAML would read as something else than a text."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if meaning(value) == value else "'")


_Dumper.add_representer(str, _text)
