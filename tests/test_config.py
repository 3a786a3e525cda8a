"""Configs: inheritance, null, --set, round trip; every mistake is an error that names its dotted path."""

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Config, load_config
from model.build import build_task, resolve
from tests.conftest import ROOT, TINY, TINY_IVT
from utils.config import constructor_options, to_plain, to_yaml
from utils.errors import ConfigError

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
# Bases are not to be trained by themselves; a loss makes them complete.
COMPLETE = {"clip_vit_b16": ["losses.itc={}"]}


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_builds_at_tiny_size_and_reloads_equal(path: Path, tmp_path: Path) -> None:
    tiny = TINY_IVT if load_config(path).model["name"] == "ivt" else TINY
    config = resolve(load_config(path, [*tiny, *COMPLETE.get(path.stem, [])]))
    build_task(config, num_pids=3)
    saved = write(tmp_path, "config.yaml", to_yaml(config))
    assert resolve(load_config(saved)) == config


def test_the_four_configs_are_shipped() -> None:
    assert {"clip_vit_b16", "baseline", "irra", "synthetic"} <= {path.stem for path in SHIPPED}


def test_mappings_merge_lists_replace_and_null_drops_a_loss(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "solver: {lr: 1.0, rules: [{match: x}, {match: y}]}\nlosses: {sdm: {}, mlm: {depth: 2}}")
    (tmp_path / "sub").mkdir()
    b = write(
        tmp_path / "sub", "b.yaml", "base: ../a.yaml\nsolver: {eps: 0.5, rules: [{match: z}]}\nlosses: {mlm: null}"
    )
    config = load_config(b)
    assert (config.solver.lr, config.solver.eps) == (1.0, 0.5)
    assert [rule.match for rule in config.solver.rules] == ["z"]
    assert config.losses == {"sdm": {}}


def test_set_wins_over_files_and_knows_null_lists_and_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "losses: {sdm: {}, id: {}}\ndata: {image_size: [8, 4]}\ntrain: {clip_grad: 1.0}")
    overrides = ["losses.id=null", "losses.mlm={depth: 1}", "losses.sdm.weight=0.5", "solver.lr=1e-4"]
    config = load_config(path, [*overrides, "data.image_size=[16, 8]", "train.clip_grad=null", "name=a=b"])
    assert config.losses == {"sdm": {"weight": 0.5}, "mlm": {"depth": 1}}
    assert (config.solver.lr, config.data.image_size, config.train.clip_grad) == (1e-4, (16, 8), None)
    assert config.name == "a=b"


def test_a_loss_that_was_dropped_can_be_had_again(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "losses: {sdm: {weight: 2}}")
    write(tmp_path, "b.yaml", "base: a.yaml\nlosses: {sdm: null}")
    c = write(tmp_path, "c.yaml", "base: b.yaml\nlosses: {sdm: {}}")
    assert load_config(c).losses == {"sdm": {}}


def test_resolving_spells_out_every_option() -> None:
    config = resolve(load_config(ROOT / "configs/irra.yaml"))
    assert config.losses["mlm"] == {"weight": 1.0, "depth": 4, "clean_captions": False}
    assert config.model["image"]["pretrained"] is True
    assert to_plain(config) == to_plain(resolve(config))


MISTAKES = {
    "data.batchsize=3": r"data\.batchsize: unknown key; did you mean 'batch_size'",
    "dta.batch_size=3": r"dta: unknown key; did you mean 'data'",
    "data.batch_size=many": r"data\.batch_size: .*many",
    "data.batch_size=1.5": r"data\.batch_size: .*1\.5",
    "data.image_size=[384]": r"data\.image_size",
    "data.image_size=384": r"data\.image_size",
    "solver.rules=[{mach: x}]": r"solver\.rules: .*mach",
    "solver.schedule.nme=cosine": r"solver\.schedule\.nme: unknown key; did you mean 'name'",
    "solver.schedule.name=cosinus": r"solver\.schedule\.name: .*cosinus.*cosine",
    "train=fast": r"train",
    "losses.sdn={}": r"losses\.sdn: unknown loss 'sdn'; did you mean 'sdm'",
    "losses.mlm.dept=3": r"losses\.mlm\.dept: unknown key; did you mean 'depth'",
    "losses.mlm.depth=deep": r"losses\.mlm\.depth: .*deep",
    "losses.mlm.depth=-1": r"losses\.mlm\.depth: must not be negative",
    "losses.itc=null": r"losses\.itc: null drops an inherited loss, but there is none.*sdm, id, mlm",
    "losses.sdm=3": r"losses\.sdm",
    "losses=null": r"losses",
    "model.name=klip": r"model\.name: unknown encoder 'klip'; did you mean 'clip'",
    "model.nam=clip": r"model\.nam: unknown key",
    "model.image.arc=vit": r"model\.image\.arc: unknown key; did you mean 'arch'",
    "model.image.arch=vit_base_patch16_clip_quickgelu_223": r"model\.image\.arch: did you mean .*quickgelu_224",
    "model.image.arch=resnet18": r"model\.image\.options: timm cannot build resnet18",
    "model.image.arch=vit_base_patch16_gap_224": r"model\.image\.arch: .*_gap_224 is no vision transformer",
    "model.image.pretrained=3": r"model\.image\.pretrained: ",
    "init.format=irra": r"init\.format: is the format of init\.path, which is not set",
    "init.pth=x": r"init\.pth: unknown key; did you mean 'path'",
    "data.val_ids=-1": r"data\.val_ids: must not be negative, is -1",
    "data.on_bad_image=skp": r"data\.on_bad_image: ",
    "data.views=0": r"data\.views: must be at least 1, is 0",
    "data.num_instances=0": r"data\.num_instances: must be at least 1, is 0",
    "data={sampler: identity, batch_size: 10}": r"data\.batch_size: 10 pairs are no multiple of data\.num_instances, 4",
    "data.sampler=identities": r"data\.sampler: .*identities",
    "losses.cmpm.target_norm=l1": r"losses\.cmpm\.target_norm: .*l1",
    "train.accumulate=9": r"train\.accumulate: 9 parts of a batch of 8 pairs",
    "train.ema=1": r"train\.ema: must be above 0 and below 1, is 1",
    "train.ema=-0.5": r"train\.ema: must be above 0 and below 1, is -0\.5",
    "data.image_std=[1, 0, 1]": r"data\.image_std: must be above 0",
    "data.image_mean=[1, 0]": r"data\.image_mean: ",
    "model.image.options.depht=2": r"model\.image\.options: .*depht",
    "model.image.stride=0": r"model\.image\.stride: 0",
    "model.image.stride=17": r"model\.image\.stride: 17",
    "model.text.options.hiden_size=2": r"model\.text\.options\.hiden_size: unknown key; did you mean 'hidden_size'",
    "model.embed_dim=0": r"model\.embed_dim: must be at least 1, is 0",
    "model.image.options.embed_dim=0": r"model\.image\.options: timm cannot build",
    "model.image.options.patch_size=0": r"model\.image\.options: timm cannot build",
    "model.text.options.hidden_size=0": r"model\.text\.options: transformers cannot build",
    "model.text.options.hidden_act=foo": r"model\.text\.options: transformers cannot build .*foo",
    "model.text.options.vocab_size=abc": r"model\.text\.options: transformers cannot build",
    "model.text.options.num_attention_heads=0": r"model\.text\.options: transformers cannot build",
    "model.text.options.num_attention_heads=7": r"model\.text\.options",
    "model.text.arch=klip": r"model\.text\.arch: unknown 'klip' \(no folder.*did you mean 'clip'",
    "model.temperature=0": r"model\.temperature: must be above 0",
    "model.embed_dim=100": r"losses\.mlm: needs model\.embed_dim to be a multiple of 64, is 100",
    "data.text_length=100": r"data\.text_length: 100 tokens, but the text tower has 77",
    "data.text_length=1": r"data\.text_length",
    "data.batch_size=1": r"data\.batch_size: must be at least 2",
    "train.epochs=0": r"train\.epochs: must be at least 1",
    "train.clip_grad=-1": r"train\.clip_grad: must not be negative",
    "train.seed=99999999999": r"train\.seed: must be less than",
    "solver.weight_decay=-1": r"solver\.weight_decay: must not be negative",
    "solver.lr=-1": r"solver\.lr: must not be negative",
    "nokey": r"--set nokey: write it as key\.subkey=value",
    "train.epochs=[": r"--set train\.epochs=\[",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_an_error_that_names_its_path(override: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        build_task(resolve(load_config(ROOT / "configs/irra.yaml", [*TINY, override])), num_pids=3)


FILES = {
    "duplicate key": (
        "losses: {}\ntrain:\n  epochs: 1\n  epochs: 2\n",
        r"a\.yaml: found duplicate key epochs \(line 4\)",
    ),
    "no YAML": ("losses: [", r"a\.yaml: .*line"),
    "a list": ("- 1\n- 2\n", r"a\.yaml: a config is a mapping"),
    "base missing": ("base: nowhere.yaml\n", r"nowhere\.yaml: no such config file \(named as 'base' in .*a\.yaml"),
    "base circular": ("base: a.yaml\n", r"a\.yaml: 'base' is circular"),
    "base a list": ("base: [b.yaml]\n", r"a\.yaml: 'base' must be the name of one file"),
    "no losses": (
        "model: {name: clip}\n",
        r"losses: there is none to train with; choose from .*mlm, sdm",
    ),
    "no encoder": ("losses: {sdm: {}}\n", r"model\.name: which encoder\? choose from clip"),
    "null without base": (
        "model: {name: clip}\nlosses:\n  sdm:\n",
        r"losses\.sdm: null drops.*to add it write 'sdm: \{\}'",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_is_an_error_that_names_it(case: str, tmp_path: Path) -> None:
    text, message = FILES[case]
    with pytest.raises(ConfigError, match=message):
        resolve(load_config(write(tmp_path, "a.yaml", text)))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"configs/ira\.yaml: no such config file"):
        load_config("configs/ira.yaml")


def key_paths(value: object, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key of a nested mapping."""
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


def test_the_default_config_is_typed() -> None:
    assert isinstance(load_config(ROOT / "configs/irra.yaml"), Config)


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
