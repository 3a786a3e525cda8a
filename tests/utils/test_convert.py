"""Conversion of plain values: texts as written, messages in plain words, defaults."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from configs.schema import load_config
from processor.resolve import resolve
from tests.helpers.configs import ROOT, write_yaml
from utils.config import to_yaml, typed
from utils.errors import ConfigError
from utils.options import option
from utils.yaml_text import read_yaml


@dataclass(frozen=True)
class Inner:
    """Inner options."""

    size: int = 3
    word: str = "a"


@dataclass(frozen=True)
class Types:
    """One option of each type."""

    text: str = "x"
    count: int = 1
    rate: float = 1.0
    flag: bool = False
    kind: Literal["on", "off"] = "on"
    maybe: str | None = None
    either: bool | str = True
    one_or_two: float | tuple[float, float] = 1.0
    pair: tuple[int, int] = (1, 2)
    names: list[str] = option([])
    inner: Inner = Inner(size=5, word="b")
    many: list[Inner] = option([])
    parts: dict[str, dict[str, Any]] = option({})
    named: dict[str, Any] = option({})
    free: Any = None
    place: str | None = option(None, path=True)


def taken(text: str) -> Types:
    return typed(Types, read_yaml(text))


@pytest.mark.parametrize("text", ["1e5", "007", "3.10", "yes", "off", "True", "1_000", "0o17", "12:30:45", "+1", ".5"])
def test_texts_arrive_as_written(text: str, tmp_path: Path) -> None:
    assert taken(f"{{text: {text}, names: [{text}], maybe: {text}}}") == Types(text, names=[text], maybe=text)
    config = resolve(load_config(ROOT / "configs/synthetic.yaml", [f"name={text}", f"data.root={text}"]))
    assert (config.name, config.data.root) == (text, text)
    assert resolve(load_config(write_yaml(tmp_path, "config.yaml", to_yaml(config)))) == config


def test_texts_of_components_arrive_as_written() -> None:
    overrides = ["model.text.arch=1e5", "model.image.options={a: 1e-2, b: True, c: 007}"]
    model = resolve(load_config(ROOT / "configs/irra.yaml", overrides)).model
    assert model["text"]["arch"] == "1e5" and model["image"]["options"] == {"a": 0.01, "b": True, "c": "007"}


def test_values_that_fit() -> None:
    assert taken("{count: '3', rate: 1e-4, flag: True, kind: off}") == Types(count=3, rate=1e-4, flag=True, kind="off")
    assert taken("{either: yes, one_or_two: [1, .5], pair: [3, 4]}") == Types(
        either="yes", one_or_two=(1, 0.5), pair=(3, 4)
    )
    assert taken("{either: False, maybe: ~, free: {a: [1e3]}}") == Types(either=False, free={"a": [1000.0]})
    assert taken("{inner: {size: 4}, many: [{size: 4}]}") == Types(inner=Inner(4, "b"), many=[Inner(4, "a")])


@pytest.mark.parametrize("text", ["3,4", "'3,4'", "3, 4", "3x4", "(3, 4)", "3 4", "[3, 4]"])
def test_tuples_need_no_brackets(text: str) -> None:
    assert taken(f"pair: {text}").pair == (3, 4)
    assert taken(f"one_or_two: {text}").one_or_two == (3.0, 4.0)


@pytest.mark.parametrize("text, names", [("a,b", ["a", "b"]), ("a", ["a"]), ("a b", ["a b"]), ("1,2e0", ["1", "2e0"])])
def test_lists_need_no_brackets_and_texts_keep_their_commas(text: str, names: list[str]) -> None:
    assert taken(f"{{names: '{text}', text: '{text}', maybe: '{text}'}}") == Types(text, names=names, maybe=text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("count: x", "count: must be an integer, got 'x'"),
        ("count: 1.5", "count: must be an integer, got 1.5"),
        ("count: 1e3", "count: must be an integer, got 1e3; write decimal digits, such as 1000"),
        ("count: true", "count: must be an integer, got true"),
        ("count: null", "count: must be an integer, got null"),
        *[
            (f"count: {number}", f"count: must be an integer, got '{number}'; write decimal digits, such as 1000")
            for number in ("007", "0o17", "0x1F", "1_000", "12:30:45")
        ],
        ("rate: 1_0.5", "rate: must be a number, got '1_0.5'; write decimal digits, such as 0.5 or 1e-4"),
        ("rate: [1]", "rate: must be a number, got [1]"),
        ("flag: yes", "flag: must be true or false, got 'yes'"),
        ("flag: 1", "flag: must be true or false, got 1"),
        ("kind: onn", "kind: must be one of on, off, got 'onn'; did you mean 'on'?"),
        ("kind: maybe", "kind: must be one of on, off, got 'maybe'"),
        ("text: null", "text: must be a text, got null; quote a text that reads null or ~"),
        ("text: [a]", "text: must be a text, got ['a']"),
        ("maybe: {a: 1}", "maybe: must be a text or null, got {'a': 1}"),
        (
            "one_or_two: [1]",
            "one_or_two: must be a number or a list of 2 numbers, got [1]; write them with commas, such as 1,2",
        ),
        ("pair: 3", "pair: must be a list of 2 integers, got 3; write them with commas, such as 1,2"),
        ("pair: '3,4,5'", "pair: must be a list of 2 integers, got '3,4,5'; write them with commas, such as 1,2"),
        ("pair: [3, x]", "pair[1]: must be an integer, got 'x'"),
        ("names: null", "names: must be a list, got null; write [] for none"),
        ("names: {a: 1}", "names: must be a list, got {'a': 1}; write [{'a': 1}]"),
        ("names: 'a{1,2}'", "names: must be a list, got 'a{1,2}'; quote each text, as in ['a', 'b']"),
        ("parts: 3", "parts: must be a mapping of options, got 3"),
        ("parts: a+b", "parts: must be a mapping of options, got 'a+b'; write {a: {}, b: {}}"),
        ("parts: [a]", "parts: must be a mapping of options, got ['a']; write {a: {}}"),
        ("parts: {a: 3}", "parts.a: must be a mapping of options, got 3; write {} for none"),
        ("named: a", "named: must be a mapping of options, got 'a'; write {name: a}"),
        ("size: 3", "size: unknown key; did you mean 'inner.size'?"),
        ("inner: 3", "inner: must be a mapping of options, got 3"),
        ("inner: {sise: 3}", "inner.sise: unknown key; did you mean 'size'?"),
        ("many: [{size: x}]", "many[0].size: must be an integer, got 'x'"),
        (f"text: [{'a' * 200}]", f"text: must be a text, got ['{'a' * 78}..."),
    ],
)
def test_what_does_not_fit_is_said_in_plain_words(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        taken(text)
    assert str(error.value) == message


def test_paths_are_expanded_and_other_texts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert (
        taken("place: ~/a").place == taken("place: $HOME/a").place == taken("place: '${HOME}/a'").place == "/home/me/a"
    )
    assert taken("place: a~/./$NONE_SUCH").place == "a~/./$NONE_SUCH" and taken("text: ~/a").text == "~/a"
    assert os.environ["HOME"] == "/home/me"
