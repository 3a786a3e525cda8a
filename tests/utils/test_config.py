"""YAML files and overrides: inheritance, null, --set, broken files, misspelt keys, arbitrary content."""

import json
import os
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import load_config
from processor.resolve import resolve
from tests.helpers.configs import ROOT, write_yaml
from tests.helpers.fuzzing import FUZZ, TREES
from utils.config import constructor_options, load_layers, to_plain
from utils.errors import ConfigError


def test_mappings_merge_lists_replace_and_null_drops_a_loss(tmp_path: Path) -> None:
    write_yaml(
        tmp_path, "a.yaml", "solver: {lr: 1.0, rules: [{match: x}, {match: y}]}\nlosses: {sdm: {}, mlm: {depth: 2}}"
    )
    (tmp_path / "sub").mkdir()
    b = write_yaml(
        tmp_path / "sub", "b.yaml", "base: ../a.yaml\nsolver: {eps: 0.5, rules: [{match: z}]}\nlosses: {mlm: null}"
    )
    config = load_config(b)
    assert (config.solver.lr, config.solver.eps) == (1.0, 0.5)
    assert [rule.match for rule in config.solver.rules] == ["z"]
    assert config.losses == {"sdm": {}}


def test_set_wins_over_files_and_knows_null_lists_and_numbers(tmp_path: Path) -> None:
    path = write_yaml(
        tmp_path, "a.yaml", "losses: {sdm: {}, id: {}}\ndata: {image_size: [8, 4]}\ntrain: {clip_grad: 1.0}"
    )
    overrides = ["losses.id=null", "losses.mlm={depth: 1}", "losses.sdm.weight=0.5", "solver.lr=1e-4"]
    config = load_config(path, [*overrides, "data.image_size=[16, 8]", "train.clip_grad=null", "name=a=b"])
    assert config.losses == {"sdm": {"weight": 0.5}, "mlm": {"depth": 1}}
    assert (config.solver.lr, config.data.image_size, config.train.clip_grad) == (1e-4, (16, 8), None)
    assert config.name == "a=b"


def test_a_loss_that_was_dropped_can_be_had_again(tmp_path: Path) -> None:
    write_yaml(tmp_path, "a.yaml", "losses: {sdm: {weight: 2}}")
    write_yaml(tmp_path, "b.yaml", "base: a.yaml\nlosses: {sdm: null}")
    c = write_yaml(tmp_path, "c.yaml", "base: b.yaml\nlosses: {sdm: {}}")
    assert load_config(c).losses == {"sdm": {}}


FILES = {
    "duplicate key": (
        "losses: {}\ntrain:\n  epochs: 1\n  epochs: 2\n",
        r"a\.yaml: found duplicate key epochs \(line 4\)",
    ),
    "no YAML": ("losses: [", r"a\.yaml: .*line"),
    "a list": ("- 1\n- 2\n", r"a\.yaml: a config must be a mapping"),
    "base missing": ("base: nowhere.yaml\n", r"nowhere\.yaml: no such config file \(named as 'base' in .*a\.yaml"),
    "base circular": ("base: a.yaml\n", r"a\.yaml: 'base' is circular"),
    "base a list": ("base: [b.yaml]\n", r"a\.yaml: 'base' must be the name of one file"),
    "no losses": (
        "model: {name: clip}\n",
        r"losses: needs at least one loss to train with; choose from .*id, .* others",
    ),
    "no encoder": ("losses: {sdm: {}}\n", r"model\.name: must be set, got None; choose from clip"),
    "null without base": (
        "model: {name: clip}\nlosses:\n  sdm:\n",
        r"losses\.sdm: null drops.*write 'sdm: \{\}' to add it",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_is_an_error_that_names_it(case: str, tmp_path: Path) -> None:
    text, message = FILES[case]
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(write_yaml(tmp_path, "a.yaml", text)))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"configs/ira\.yaml \(relative to the working directory /.*\): no such config"
    ):
        load_config("configs/ira.yaml")


@pytest.mark.parametrize(
    "name", ["irra", "ira", "IRRA.yaml", "irra.yml", "configs/ira.yaml", "config/irra.yaml", "/no/irra"]
)
def test_the_nearest_config_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, shown in ((ROOT, "configs"), (tmp_path, f"{ROOT}/configs")):
        monkeypatch.chdir(folder)
        with pytest.raises(ConfigError, match=rf"no such config file; did you mean '{shown}/irra\.yaml'\?"):
            load_config(name)
    with pytest.raises(ConfigError, match=r"choose from .* and \d+ others in .*configs"):
        load_config("zzz")


def test_pipes_and_devices_are_no_configs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    write_yaml(tmp_path, "b.yaml", "base: a.yaml")
    write_yaml(tmp_path, "c.yaml", "base: /dev/zero")
    for name, message in (("a", "a named pipe"), ("b", "a named pipe"), ("c", "a device")):
        with pytest.raises(ConfigError, match=f"must be a YAML file, got {message}"):
            load_config(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    "base", ['"a\\0b"', '"\\ud800"', "[x.yaml]", "5", "{a: 1}", "x.yaml", ".", "''", "a" * 5000, "loop"]
)
def test_a_base_that_is_no_file_is_a_clear_error(base: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError):
        load_layers(write_yaml(tmp_path, "x.yaml", f"base: {base}\n"))


def test_an_endless_chain_of_bases_is_refused(tmp_path: Path) -> None:
    for number in range(30):
        write_yaml(tmp_path, f"{number}.yaml", f"base: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match=r"20\.yaml: 'base' must lead through at most 20 files"):
        load_layers(tmp_path / "0.yaml")


def key_paths(value: object, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all keys of a nested mapping."""
    if not isinstance(value, dict):
        return []
    paths = [(key, (*above, key)) for key in value]
    return [found for key, path in paths for found in (path, *key_paths(value[key], path))]


KEYS = key_paths(to_plain(resolve(load_config(ROOT / "configs/irra.yaml"))))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_misspelt_key_is_rejected(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(KEYS))
    at = data.draw(st.integers(0, len(path[-1])))
    typo = path[-1][:at] + data.draw(st.sampled_from(string.ascii_lowercase)) + path[-1][at:]
    with pytest.raises(ConfigError, match=typo):
        resolve(load_config(ROOT / "configs/irra.yaml", [".".join([*path[:-1], typo]) + "=1"]))


# --- constructors as schemas ------------------------------------------------------------------------------------------


class _Base:
    def __init__(self, fact: int, *, size: int = 3, name: str = "base") -> None:
        self.options = (size, name)


class _Handing(_Base):
    def __init__(self, fact: int, *, extra: bool = False, name: str = "own", **base: Any) -> None:
        super().__init__(fact, name=name, **base)


class _Silent(_Handing):
    pass


class _Closed(_Handing):
    def __init__(self, fact: int, *, only: int = 1) -> None:
        super().__init__(fact)


def test_a_constructor_may_hand_options_on_to_its_base_class() -> None:
    for constructor in (_Handing, _Silent):
        assert constructor_options(constructor, {"size": 5}, "x") == {"extra": False, "name": "own", "size": 5}
        with pytest.raises(ConfigError, match=r"x\.siz: unknown key; did you mean 'size'"):
            constructor_options(constructor, {"siz": 5}, "x")
    assert constructor_options(_Closed, {}, "x") == {"only": 1}
    assert constructor_options(_Base, {}, "x") == {"size": 3, "name": "base"}


# --- arbitrary content ------------------------------------------------------------------------------------------------


@FUZZ
@given(tree=TREES)
def test_any_yaml_is_a_config_or_a_clear_error(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    with pytest.raises(ConfigError) as error:  # the encoder is missing in any case
        resolve(load_config(path))
    assert str(error.value)


@FUZZ
@given(content=st.binary(max_size=80) | st.text("{}[]:-#&*!|>'\"%@`, \n\tab1.", max_size=40).map(str.encode))
def test_any_bytes_are_a_config_or_a_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        resolve(load_config(path))


SOME_KEYS = [
    "data.batch_size",
    "losses.sdm",
    "losses.sdm.weight",
    "solver.lr",
    "model",
    "model.image.options",
    "train.ema",
]


@settings(max_examples=25, deadline=None)
@given(
    key=st.sampled_from(SOME_KEYS) | st.text(string.printable, max_size=10),
    value=st.text(string.printable, max_size=12),
)
def test_any_override_is_taken_or_a_clear_error(key: str, value: str) -> None:
    try:
        resolve(load_config(ROOT / "configs/irra.yaml", [f"{key}={value}"]))
    except ConfigError as error:
        assert str(error)
