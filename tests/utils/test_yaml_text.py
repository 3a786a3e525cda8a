"""YAML text: spellings, round trips, refusals."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fuzzing import FUZZ
from utils.yaml_text import Plain, read_yaml, settled, write_yaml

SCALARS = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False)
    | st.text("0123456789._-+eExobnNulyYtTsffi:~ '\"#{}[]\n\t&*!", max_size=8)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aeosnfy10~.:", max_size=4), inner)
)


@pytest.mark.parametrize(
    "text, value",
    [
        *[(word, None) for word in ("", "~", "null", "Null", "NULL")],
        *[(word, True) for word in ("true", "True", "TRUE")],
        *[(word, word) for word in ("yes", "off", "y", "007", "0o17", "0x1F", "1_000", "12:30:45", "2026-01-01", "=")],
        *[("7", 7), ("-7", -7), ("+7", 7), ("0.5", 0.5), ("3.10", 3.1), ("1e5", 1e5), ("1.0e-08", 1e-8), (".5", 0.5)],
        *[("-.inf", -math.inf), ("'7'", "7"), ('"true"', "true"), ("9" * 400, math.inf), ("1e", "1e"), ("nan", "nan")],
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = settled(read_yaml(text))
    assert found == value and type(found) is type(value)


def test_unusual_spellings_are_kept() -> None:
    spellings = ["1e5", "3.10", "+7", "True", ".5", "1.0e-08", "-0"]
    assert read_yaml(f"[{', '.join(spellings)}]") == spellings
    assert all(type(scalar) is Plain for scalar in read_yaml(f"[{', '.join(spellings)}]"))
    assert read_yaml("[7, 0.5, true, 1e+16]") == [7, 0.5, True, 1e16]


@FUZZ
@given(value=VALUES)
def test_any_plain_value_reads_back_equal(value: Any) -> None:
    assert settled(read_yaml(write_yaml(value))) == value


@pytest.mark.parametrize("text", ["7", "007", "1e5", "yes", "off", "null", "~", "1_000", "0o17", "12:30:45", "3.10"])
def test_texts_are_written_so_that_every_reader_takes_them_for_texts(text: str) -> None:
    assert yaml.safe_load(write_yaml({"a": text})) == {"a": text} == read_yaml(write_yaml({"a": text}))


def test_keys_are_texts_and_anchors_and_merge_keys_work() -> None:
    assert read_yaml("{off: 1, 1: 2}") == {"off": 1, "1": 2}
    assert read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


def levels(number: int) -> str:
    """Lists within lists."""
    return "[" * number + "]" * number


@pytest.mark.parametrize("first", ["[x, x, x]", "{x: 1, y: 2}"])
@pytest.mark.parametrize("fold", ["[{}]", "{{a: {}}}", "{{<<: [{}]}}"])
def test_aliases_that_multiply_are_refused_at_once(first: str, fold: str) -> None:
    lines = [f"a0: &a0 {first}"]
    for number in range(1, 12):
        again = ", ".join([f"*a{number - 1}"] * 9)
        lines.append(f"a{number}: &a{number} " + fold.format(again if "[" in fold else f"[{again}]"))
    with pytest.raises(yaml.YAMLError, match="too many values"):
        read_yaml("\n".join(lines))


def test_many_keys_and_levels_below_the_bounds_are_read() -> None:
    assert len(read_yaml("\n".join(f"a{number}: 1" for number in range(3_000)))) == 3_000
    assert read_yaml(levels(50)) is not None


@pytest.mark.parametrize(
    "text",
    [
        'a: "\\ud83d"',
        *[
            "{a: 1, a: 2}",
            "[" * 5000,
            "&x [*x]",
            "a: &x {b: *x}",
            "{[1]: 2}",
            "!!binary aGk=",
            "!!python/name:os.system x",
        ],
        *["!!float x", "!!int 1", "!!null x", "!!set {a, b}", "!!omap [a: 1]", "!!str [a]", "!!str {a: 1}", "!!map x"],
        *["!!map [a]", "!!seq x", "!!seq {a: 1}", "!x y", "a: {<<: 1}", "a: {<<: [1]}", "a\0b", "%YAML 9.9\n--- a"],
        *[levels(51), "{a: " * 51 + "}" * 51, f"a: &a {levels(30)}\nb: {levels(29).replace('[]', '[*a]')}"],
    ],
)
def test_what_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)
