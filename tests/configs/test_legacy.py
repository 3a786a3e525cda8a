"""Configs of version 0.1: their schedule options are mapped, run folders and checkpoints load."""

from pathlib import Path

import pytest
import torch
import yaml

from configs.legacy import SCHEDULE_0_1, SCHEDULE_OPTIONS, upgrade
from configs.schema import load_config, parse_config
from processor import training
from processor.resolve import resolve
from solver.schedule import schedule_options
from tests.helpers.configs import irra_config
from tests.helpers.runs import lines_of
from utils.checkpoint import load_checkpoint, save_checkpoint

DEFAULTS = {
    "warmup_epochs": 5, "warmup_factor": 0.1, "warmup": "linear", "warmup_lr": 0.0, "min_lr": 0.0,
    "milestones": [20, 50], "gamma": 0.1, "power": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("name", list(SCHEDULE_OPTIONS))
def test_every_schedule_keeps_its_options_and_no_others(name: str) -> None:
    assert set(DEFAULTS) | {"name"} == SCHEDULE_0_1
    data = upgrade({"solver": {"lr": 1.0, "schedule": {"name": name, **DEFAULTS}}})
    schedule = schedule_options(data["solver"]["schedule"])
    assert schedule["warmup_epochs"] == 5 and data["solver"]["lr"] == 1.0
    assert data["solver"]["schedule"] == schedule


def test_configs_of_this_version_stay_as_they_are() -> None:
    for data in ({}, {"solver": None}, {"solver": {"schedule": {"name": "step", "gamma": 0.5}}}, {"solver": {"lr": 1}}):
        assert upgrade(data) == data


@pytest.mark.parametrize("old, new", [("true", "towers"), ("false", "none"), ("step", "step")])
def test_compile_was_true_or_false(old: str, new: str) -> None:
    assert parse_config(f"train: {{compile: {old}}}").train.compile == new


def test_a_run_of_version_0_1_is_resumed(tiny: list[str], tmp_path: Path) -> None:
    """Rewrite a run as version 0.1 wrote it: schedule, augmentations, training state, no trackers and no version."""
    config = irra_config(tiny, "train.epochs=2", "losses.sdm.consensus=auto")
    run = training.train(config, tmp_path / "run")
    old = yaml.safe_load((run / "config.yaml").read_text())
    old["solver"]["schedule"] = {"name": "cosine", **DEFAULTS, **old["solver"]["schedule"]}
    old["data"]["image_aug"] = [next(iter(entry)) for entry in old["data"]["image_aug"]]
    del old["train"]["trackers"]
    old["train"]["compile"] = False
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    assert resolve(load_config(run / "config.yaml")) == config == resolve(parse_config(yaml.safe_dump(old)))
    content = load_checkpoint(run / "last.pt")
    states = content["training"].pop("objectives")
    content["training"]["counted"] = {name: states[name].get("clean_mask") for name in ("sdm",)}
    del content["version"]
    save_checkpoint(run / "last.pt", content | {"config": yaml.safe_dump(old)})
    training.resume(run, ["train.epochs=3"])
    assert [line["epoch"] for line in lines_of(run)] == [1, 2, 3]
    assert torch.is_tensor(load_checkpoint(run / "last.pt")["training"]["objectives"]["sdm"]["clean_mask"])
