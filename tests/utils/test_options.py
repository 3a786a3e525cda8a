"""Options: bounds, help and schemas of constructors."""

import dataclasses
import functools
import math
from typing import Annotated, Any

import pytest

from utils.config import constructor_options, typed
from utils.errors import ConfigError
from utils.options import Option, argument_help, option, option_of, schema_of, walk


@dataclasses.dataclass(frozen=True)
class Inner:
    """Inner options."""

    rate: float = option(0.5, ge=0, lt=1, help="a rate", resumable=True)
    sizes: tuple[int, int] = option((4, 2), ge=1, help="sizes")


@dataclasses.dataclass(frozen=True)
class Outer:
    """Outer options."""

    name: str = option("a", help="a name")
    inner: Inner = option(Inner())
    many: list[Inner] = option([], help="several")
    free: dict[str, Any] = option({}, help="free-form")
    maybe: int | None = option(None, ge=2, help="a number or null")


class Base:
    """Base.

    Args:
        weight: weight of the thing; it
            may be zero.
    """

    def __init__(self, facts: int, *, weight: Annotated[float, Option(ge=0)] = 1.0) -> None:
        self.weight = weight


class Derived(Base):
    """Derived.

    Args:
        depth: number of layers.
        base: options of `Base`.

    Raises:
        ValueError: never.
    """

    def __init__(self, facts: int, *, depth: Annotated[int, Option(gt=0)], **base: Any) -> None:
        super().__init__(facts, **base)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"inner": {"rate": 1}}, r"^inner\.rate: must be at least 0 and below 1, got 1\.0$"),
        ({"inner": {"rate": -0.1}}, r"^inner\.rate: must be at least 0 and below 1, got -0\.1$"),
        ({"inner": {"rate": math.nan}}, r"^inner\.rate: must be a finite number, got nan$"),
        ({"inner": {"sizes": [3, 0]}}, r"^inner\.sizes: must be at least 1, got 0$"),
        ({"many": [{}, {"rate": 2}]}, r"^many\[1\]\.rate: must be at least 0 and below 1, got 2\.0$"),
        ({"free": {"a": {"b": [1, math.inf]}}}, r"^free\.a\.b: must be a finite number, got inf$"),
        ({"maybe": 1}, r"^maybe: must be at least 2, got 1$"),
    ],
)
def test_numbers_out_of_bounds_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(Outer, data)
    with pytest.raises(ConfigError, match=message.replace("^", r"^solver\.")):
        typed(Outer, data, "solver")


def test_numbers_within_bounds_pass() -> None:
    data = {"inner": {"rate": 0.0}, "many": [{"sizes": [1, 1]}], "maybe": None, "free": {"flag": True}}
    options = typed(Outer, data)
    assert options.inner.rate == 0 and options.many[0].sizes == (1, 1) and options.free == {"flag": True}
    assert typed(Outer, {}).many is not typed(Outer, {}).many


def test_bounds_read_well() -> None:
    assert Option(ge=0, lt=1).bounds() == "at least 0 and below 1" and Option(gt=0).bounds() == "above 0"
    assert Option(ge=0, le=2**32).bounds() == "from 0 to 4,294,967,296" and Option().bounds() == ""


def test_a_class_adds_the_options_of_its_base() -> None:
    assert constructor_options(Derived, {"depth": 2}, "x") == {"depth": 2, "weight": 1.0}
    fields = {field.name: option_of(field) for field in dataclasses.fields(schema_of(Derived))}
    assert fields["depth"] == Option(gt=0, help="number of layers")
    assert fields["weight"] == Option(ge=0, help="weight of the thing; it may be zero")
    for options, message in (
        ({}, r"x\.depth"),
        ({"depth": 0}, r"x\.depth: must be above 0, got 0"),
        ({"depth": 1, "weight": -1}, r"x\.weight: must be at least 0, got -1\.0"),
        ({"depth": 1, "facts": 3}, r"x\.facts: unknown key"),
    ):
        with pytest.raises(ConfigError, match=message):
            constructor_options(Derived, options, "x")


def test_a_function_adds_the_options_of_the_one_it_wraps() -> None:
    def inner(value: int, *, power: float = 2.0) -> float:
        """Inner.

        Args:
            power: exponent.
        """
        return value**power

    @functools.wraps(inner, assigned=("__name__", "__doc__"))
    def outer(value: int, *, scale: Annotated[float, Option(help="a factor")] = 1.0, **options: Any) -> float:
        return scale * inner(value, **options)

    assert constructor_options(outer, {"power": 3}, "x") == {"scale": 1.0, "power": 3.0}
    help_of = {field.name: option_of(field).help for field in dataclasses.fields(schema_of(outer))}
    assert help_of == {"scale": "a factor", "power": "exponent"}


def test_walking_a_schema_gives_dotted_paths() -> None:
    found = {path: option_of(field) for path, field, _ in walk(Outer, "top")}
    assert list(found) == ["top.name", "top.inner.rate", "top.inner.sizes", "top.many", "top.free", "top.maybe"]
    assert found["top.inner.rate"].resumable and not found["top.name"].resumable


def test_help_is_read_from_the_docstring() -> None:
    docstring = (
        "Short.\n\n    Args:\n        a: first\n            entry.\n        b: second\n\n    Returns:\n        c"
    )
    assert argument_help(docstring) == {"a": "first entry", "b": "second"}
    assert argument_help("Without arguments.") == {}
