"""The schema: shipped configs build and reload, and every mistake is an error that names its dotted path."""

from pathlib import Path

import numpy as np
import pytest

from configs.schema import Config, load_config, parse_config
from model.build import build_task
from processor.resolve import resolve
from tests.helpers.configs import ROOT, TINY, TINY_IVT, write_yaml
from tests.helpers.golden import RECIPE
from utils.config import to_yaml
from utils.errors import ConfigError

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
# Base configs have no loss; these overrides make them complete.
COMPLETE = {"clip_vit_b16": ["losses.itc={}"]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_builds_at_tiny_size_and_reloads_equal(path: Path, tmp_path: Path) -> None:
    tiny = TINY_IVT if load_config(path).model["name"] == "ivt" else TINY
    config = resolve(load_config(path, [*tiny, *COMPLETE.get(path.stem, [])]))
    build_task(config, num_pids=3, weights=False, teacher=False)
    saved = write_yaml(tmp_path, "config.yaml", to_yaml(config))
    assert resolve(load_config(saved)) == config


def test_the_four_configs_are_shipped() -> None:
    assert {"clip_vit_b16", "baseline", "irra", "synthetic"} <= {path.stem for path in SHIPPED}


def test_the_default_config_is_typed() -> None:
    assert isinstance(load_config(ROOT / "configs/irra.yaml"), Config)


def test_the_saved_config_reads_back_with_init(tmp_path: Path) -> None:
    config = resolve(load_config(ROOT / "configs/irra.yaml", [*TINY, "init={path: a.pt, format: fmfa}"]))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert resolve(load_config(tmp_path / "config.yaml")) == config
    assert np.isclose(config.data.image_mean[0], 0.48145466)


MISTAKES = {
    "data.batchsize=3": r"data\.batchsize: unknown key; did you mean 'batch_size'",
    "dta.batch_size=3": r"dta: unknown key; did you mean 'data'",
    "data.batch_size=many": r"data\.batch_size: .*many",
    "data.batch_size=1.5": r"data\.batch_size: .*1\.5",
    "data.image_size=[384]": r"data\.image_size",
    "data.image_size=384": r"data\.image_size",
    "solver.rules=[{mach: x}]": r"solver\.rules\[0\]\.mach: unknown key; did you mean 'match'",
    "solver.schedule.nme=cosine": r"solver\.schedule\.nme: cosine has no such option .*; did you mean 'name'",
    "solver.schedule.name=cosinus": r"solver\.schedule\.name: .*cosinus.*cosine",
    "train=fast": r"train",
    "losses.sdn={}": r"losses\.sdn: unknown loss 'sdn'; did you mean 'sdm'",
    "losses.mlm.dept=3": r"losses\.mlm\.dept: unknown key; did you mean 'depth'",
    "losses.mlm.depth=deep": r"losses\.mlm\.depth: .*deep",
    "losses.mlm.depth=-1": r"losses\.mlm\.depth: must be from 0 to 1,000, got -1",
    "losses.itc=null": r"losses\.itc: null drops an inherited loss.*sdm, id, mlm",
    "losses.sdm=3": r"losses\.sdm",
    "losses=null": r"losses",
    "model.name=klip": r"model\.name: unknown encoder 'klip'; did you mean 'clip'",
    "model.nam=clip": r"model\.nam: clip has no such option .*; did you mean 'name'",
    "model.image.arc=vit": r"model\.image\.arc: unknown key; did you mean 'arch'",
    "model.image.arch=vit_base_patch16_clip_quickgelu_223": r"model\.image\.arch: unknown .*did you mean .*_224",
    "train.timeout=1000000000000000": r"train\.timeout: must be .*, got 1000000000000000",  # more than torch takes
    "data.timeout=1000000000000000": r"data\.timeout: must be .*, got 1000000000000000",
    "model.image.arch=resnet18": r"model\.image\.arch: ResNet towers are not supported, got resnet18",
    "model.image.arch=vit_base_patch16_gap_224": r"model\.image\.arch: must be a vision transformer .*_gap_224",
    "model.image.pretrained=[3]": r"model\.image\.pretrained: must be true or false or a text, got \[3\]",
    "init.format=irra": r"init\.format: describes init\.path, which is null",
    "init.pth=x": r"init\.pth: unknown key; did you mean 'path'",
    "data.val_ids=-1": r"data\.val_ids: must be at least 0, got -1",
    "data.on_bad_image=skp": r"data\.on_bad_image: ",
    "data.views=0": r"data\.views: must be at least 1, got 0",
    "data.num_instances=0": r"data\.num_instances: must be at least 1, got 0",
    "data={sampler: identity, batch_size: 10}": r"data\.batch_size: must be a multiple of .* \(4\), got 10",
    "data.sampler=identities": r"data\.sampler: .*identities",
    "losses.cmpm.target_norm=l1": r"losses\.cmpm\.target_norm: .*l1",
    "train.accumulate=9": r"train\.accumulate: must be at most data\.batch_size \(8\), got 9",
    "train={shard: full, compile: true}": r"train\.compile: cannot be combined with train\.shard=full",
    "train.ema=1": r"train\.ema: must be above 0 and below 1, got 1",
    "train.ema=-0.5": r"train\.ema: must be above 0 and below 1, got -0\.5",
    "data.image_std=[1, 0, 1]": r"data\.image_std: must be above 0",
    "data.image_mean=[1, 0]": r"data\.image_mean: ",
    "model.image.options.depht=2": r"model\.image\.options\.depht: unknown key .*'depth'",
    "model.image.stride=0": r"model\.image\.stride: must be at least 1, got 0",
    "model.image.stride=17": r"model\.image\.stride: must be from 1 to 16 .* got 17",
    "model.text.options.hiden_size=2": r"model\.text\.options\.hiden_size: unknown key; did you mean 'hidden_size'",
    "model.embed_dim=0": r"model\.embed_dim: must be from 1 to 1,000,000, got 0",
    "model.image.options.embed_dim=0": r"model\.image\.options\.embed_dim: must be from 1 to 1,000,000, got 0",
    "model.image.options.patch_size=0": r"model\.image\.options\.patch_size: must be from 1 to",
    "model.text.options.hidden_size=0": r"model\.text\.options\.hidden_size: must be from 1 to",
    "model.text.options.hidden_act=foo": r"model\.text\.options: transformers cannot build .*foo",
    "model.text.options.vocab_size=abc": r"model\.text\.options\.vocab_size: must be an integer, got 'abc'",
    "model.text.options.num_attention_heads=0": r"model\.text\.options\.num_attention_heads: must be from 1 to",
    "model.text.options.num_attention_heads=7": r"model\.text\.options",
    "model.text.arch=klip": r"model\.text\.arch: unknown 'klip', neither a folder .*did you mean 'clip'",
    "model.temperature=0": r"model\.temperature: must be above 0",
    "model.embed_dim=100": r"losses\.mlm: needs model\.embed_dim to be a multiple of 64, got 100",
    "data.text_length=100": r"data\.text_length: must be at most 77, .*text tower.*, got 100",
    "data.text_length=1": r"data\.text_length",
    "data.batch_size=1": r"data\.batch_size: must be at least 2",
    "train.epochs=0": r"train\.epochs: must be at least 1",
    "train.clip_grad=0": r"train\.clip_grad: must be above 0",
    "train.seed=99999999999": r"train\.seed: must be from 0 to 4,294,967,295",
    "solver.weight_decay=-1": r"solver\.weight_decay: must be at least 0",
    "solver.eps=0": r"solver\.eps: must be above 0",
    "solver.momentum=1": r"solver\.momentum: must be at least 0 and below 1",
    "data.image_mean=[123.7, 116.3, 103.5]": r"data\.image_mean: must be from 0 to 1, got 123\.7",
    "data.image_aug=[{erase: {area: [0.4, 0.1]}}]": r"data\.image_aug\.erase\.area: must be in ascending order",
    "losses.sdm.eps=0": r"losses\.sdm\.eps: must be above 0",
    "losses.asdm.alpha=[1, -1]": r"losses\.asdm\.alpha: must be at least 0, got -1",
    "losses.asdm.alpha=.inf": r"losses\.asdm\.alpha: must be a finite number",
    "losses.tal.margin=-1": r"losses\.tal\.margin: must be at least 0",
    "model.image.options.drop_rate=.nan": r"model\.image\.options\.drop_rate: must be a finite number",
    "train.epochs=10000000000000000000000": r"train\.epochs: must be between -2\^63 and 2\^63",
    "solver.lr=-1": r"solver\.lr: must be at least 0",
    "nokey": r"--set nokey: must have the form key\.subkey=value",
    "train.epochs=[": r"--set train\.epochs=\[",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_an_error_that_names_its_path(override: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        build_task(resolve(load_config(ROOT / "configs/irra.yaml", [*TINY, override])), num_pids=3)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.noise_rate=1", r"data\.noise_rate: must be at least 0 and below 1, got 1\.0"),
        ("data.noise_rate=-0.1", r"data\.noise_rate: must be at least 0 and below 1"),
        ("data.noise_rate=nan", r"data\.noise_rate: "),
        ("data.noise_rate=half", r"data\.noise_rate: "),
        ("data.noise_seed=-1", r"data\.noise_seed: must be from 0 to"),
        ("data.noise_seed=4294967296", r"data\.noise_seed: must be from 0 to"),
        ("data.noise_file=x.npy", r"data\.noise_file: needs data\.noise_rate"),
        ("data.text_aug=1.5", r"data\.text_aug: must be from 0 to 1"),
        ("data.text_aug=-1", r"data\.text_aug: must be from 0 to 1"),
    ],
)
def test_bad_options_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("configs/irra.yaml", [override])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init.skip=[pos_embed]"], r"init\.skip: names tensors of init\.path, which is null"),
        (["init.path=a.pt", "init.skip=['(']"], r"init\.skip: must be a regular expression, got '\('"),
    ],
)
def test_bad_skips_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, overrides)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "null: 1",
            ": 1",
            "data: {null: 1}",
            "solver: {lr: !!float x}",
            "data: !!set {a, b}",
            "a: &a [*a]",
            "- 1",
            "5",
        ],
        *[
            f"{key}: {'9' * 5000}}}"
            for key in ("train: {epochs", "solver: {lr", "model: {embed_dim", "data: {text_aug")
        ],
        *['init: {path: "a\\0b"}', 'data: {root: "a\\0b"}', 'name: "a\\0b"', "base: x.yaml", "name: a\0b"],
        *["data: {text_levels: [{a: 1}]}", "data: {text_levels: [[a]]}", "data: {text_levels: [null]}"],
        *[
            "init: {skip: [{a: 1}]}",
            "solver: {rules: [1]}",
            "solver: {rules: {a: 1}}",
            "data: {image_size: [{a: 1}, 2]}",
        ],
        *["data: {image_aug: [{a: 1}]}", "data: {image_aug: [[a]]}", "data: {image_aug: [null]}", "losses: [a]"],
        *["train: {trackers: [{a: 1}]}", "solver: {schedule: {name: [a]}}", "losses: {null: {}}", "losses: {sdm: 1}"],
        *["model: [1]", "model: {name: {a: 1}}", "model: {image: [1]}", "model: {image: {options: [1]}}"],
    ],
)
def test_odd_yaml_is_one_clear_error_in_a_file_and_in_a_checkpoint(text: str, tmp_path: Path) -> None:
    base = "" if text[0] in "-5b" else f"base: {ROOT}/configs/synthetic.yaml\n"
    file = tmp_path / "x.yaml"
    file.write_text(base + text + "\n")
    for read in (lambda: load_config(file), lambda: parse_config(text)):
        with pytest.raises(ConfigError) as caught:
            resolve(read())
        assert len(str(caught.value)) < 500 and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["${", "${oc.env:SECRET}", "${oc.env:SECRET,x}", "${SECRET}", "$SECRET", "${name}"])
def test_texts_are_not_looked_up_anywhere(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    assert load_config(ROOT / "configs/synthetic.yaml", [f"name='{text}'"]).name == text


@pytest.mark.parametrize("text", ["$SECRET", "'${SECRET}/x'", '"\\x24SECRET"', "[{a: [$SECRET]}]"])
@pytest.mark.parametrize("key", ["data: {root: %s}", "model: {image: {pretrained: %s}}", "data: {image_aug: %s}"])
def test_a_config_in_a_checkpoint_does_not_read_the_environment(
    key: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(ConfigError, match=r"must not name an environment variable .*SECRET") as error:
        parse_config(key % text)
    assert "hunter2" not in str(error.value)
    monkeypatch.delenv("SECRET")
    parse_config("data: {root: $SECRET}")
