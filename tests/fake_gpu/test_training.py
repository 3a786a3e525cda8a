"""Training on a simulated GPU: no tensor is elsewhere, no step waits for it, and the numbers are those of the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from processor.trainer import Trainer
from tests.helpers.gpu_runs import SHIPPED, different_configs, shipped_config, train_epoch, trainer_of
from tests.helpers.simulated_gpu import GPU, SimulatedGpu, simulated_gpu

CONFIGS = different_configs()
READS = "processor/meters.py:"  # the log's numbers, read once for many steps
SELECTS = "model/objectives/pair.py:"  # clean pairs, before an epoch


def watched_epoch(gpu: SimulatedGpu, trainer: Trainer) -> tuple[dict[str, Any], list[str]]:
    """The record of the first epoch, and the host synchronisations in it."""
    before = len(gpu.syncs)
    record = train_epoch(trainer)
    return record, gpu.syncs[before:]


def test_all_shipped_configs_are_tested() -> None:
    assert sorted(name for names in CONFIGS.values() for name in names) == SHIPPED


@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_evaluation_are_those_of_the_cpu(name: str, root: Path, tmp_path: Path) -> None:
    config = shipped_config(name, root)
    with sdpa_kernel(SDPBackend.MATH):
        on_cpu = trainer_of(config, torch.device("cpu"), tmp_path)
        expected, metrics = train_epoch(on_cpu), on_cpu._evaluate(1)
    with simulated_gpu() as gpu:
        trainer = trainer_of(config, GPU, tmp_path)
        found, waits = watched_epoch(gpu, trainer)
        assert not [wait for wait in waits if not wait.startswith((READS, SELECTS))]
        assert trainer._evaluate(1) == metrics
    losses = {key: value for key, value in expected.items() if "loss" in key or "acc" in key}
    assert losses == pytest.approx({key: found[key] for key in losses}, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["train.precision=fp16", "train.clip_grad=1", "train.accumulate=2"],
        ["train.precision=bf16", "model.image.checkpointing=true", "model.text.checkpointing=true"],
        ["train.ema=0.9", "data.batch_size=16", "solver.optimizer=sgd"],
    ],
    ids=" ".join,
)
def test_options_of_the_loop_do_not_wait(options: list[str], root: Path, tmp_path: Path) -> None:
    with simulated_gpu() as gpu:
        trainer = trainer_of(shipped_config("fmfa", root, *options), GPU, tmp_path)
        _, waits = watched_epoch(gpu, trainer)
    assert waits and not [wait for wait in waits if not wait.startswith(READS)]


@pytest.mark.parametrize("options", [["model.mask_per_sample=true"], ["train.accumulate=2"]], ids=" ".join)
def test_masking_does_not_wait(options: list[str], root: Path, tmp_path: Path) -> None:
    with simulated_gpu() as gpu:
        trainer = trainer_of(shipped_config("ivt", root, *options), GPU, tmp_path)
        _, waits = watched_epoch(gpu, trainer)
    assert waits and not [wait for wait in waits if not wait.startswith(READS)]


def test_waits_of_an_epoch_do_not_grow_with_its_steps(root: Path, tmp_path: Path) -> None:
    """The selection of clean pairs included."""
    waits = []
    for size in (32, 8):
        with simulated_gpu() as gpu:
            options = [f"data.batch_size={size}", "train.log_every=100"]
            trainer = trainer_of(shipped_config("rde", root, *options), GPU, tmp_path)
            waits.append([wait.partition(" in ")[0] for wait in watched_epoch(gpu, trainer)[1]])
    assert waits[0] == waits[1]
