"""A GPU computes as the CPU does, without waiting, and fast: `python -m pytest -m gpu` (docs/training.md)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import load_config
from processor.resolve import resolve
from tests.helpers.configs import CONFIGS
from tests.helpers.gpu_checks import (
    gathered,
    golden_error,
    golden_step,
    optimizer_error,
    speed,
    steps_without_waits,
)
from tests.helpers.gpu_runs import different_configs, shipped_config, trainer_of
from tests.helpers.processes import together

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
Row = Callable[[str, str], None]
Golden = dict[str, np.ndarray]


def test_features_are_the_authors(device: torch.device, model_golden: Golden, row: Row) -> None:
    error = golden_error(device, model_golden)
    row("golden features, largest difference", f"{error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("precision, most", [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.05)])
def test_a_step_is_that_of_the_cpu(
    precision: str, most: float, device: torch.device, model_golden: Golden, row: Row
) -> None:
    step = golden_step(device, model_golden, precision)
    error = golden_step(torch.device("cpu"), model_golden).error(step)
    row(f"step in {precision}, relative difference to the CPU's fp32", f"{error:.1e}")
    assert step.finite and error < most


@pytest.mark.parametrize("parts", ["towers", "step"])
def test_a_compiled_step_is_that_of_eager_mode(
    parts: str, device: torch.device, model_golden: Golden, row: Row
) -> None:
    error = golden_step(device, model_golden).error(golden_step(device, model_golden, parts=parts))
    row(f"train.compile={parts}, relative difference to eager", f"{error:.1e}")
    assert error < 1e-3


def test_fused_updates_are_those_of_single_tensors(device: torch.device, root: Path, row: Row) -> None:
    error = optimizer_error(device, shipped_config("irra", root, "solver.lr=1e-3"))
    row("fused optimizer, largest difference", f"{error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("name", different_configs())
def test_no_step_waits_for_the_gpu(name: str, device: torch.device, root: Path, tmp_path: Path, row: Row) -> None:
    options = [
        "data.batch_size=8",
        "data.num_instances=2",
        "train.precision=bf16",
        "train.ema=0.9",
        "train.clip_grad=1",
    ]
    loss = steps_without_waits(trainer_of(shipped_config(name, root, *options), device, tmp_path))
    row(f"{name}: host synchronisations in a step", "none")
    assert np.isfinite(loss)


def test_processes_gather_rows_by_nccl(device: torch.device, row: Row) -> None:
    if torch.cuda.device_count() < 2:
        row("gather over two GPUs", "not run, one GPU")
        pytest.skip("needs two GPUs")
    results = together(2, gathered, "cuda")
    assert results == [([0.0, 1.0, 1.0], [2.0]), ([0.0, 1.0, 1.0], [4.0, 6.0])]
    row("gather over two GPUs", "as on the CPU")


@pytest.mark.parametrize("options", [[], ["train.compile=towers"], ["train.compile=step"]], ids=" ".join)
def test_throughput_of_irra(options: list[str], device: torch.device, row: Row) -> None:
    config = resolve(load_config(CONFIGS / "irra.yaml", options))
    found = speed(config, device, config.data.batch_size)
    name = f"IRRA, 64 pairs, bf16{', '.join(['', *options])}"
    row(name, f"{found.pairs_per_second:.0f} pairs/s, {found.memory:.2f} GiB (preflight: {found.predicted:.2f})")
