"""The checks of `pytest -m gpu` themselves, run on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.gpu_checks import (
    gathered,
    golden_error,
    golden_step,
    optimizer_error,
    speed,
    steps_without_waits,
)
from tests.helpers.gpu_runs import shipped_config, trainer_of
from tests.helpers.graphs import counted_graphs
from tests.helpers.processes import together

CPU = torch.device("cpu")


def test_golden_features_and_a_step_in_bf16(model_golden: dict[str, np.ndarray]) -> None:
    assert golden_error(CPU, model_golden) < 1e-5
    step = golden_step(CPU, model_golden)
    assert step.error(step) == 0 and step.finite
    assert 0 < step.error(golden_step(CPU, model_golden, "bf16")) < 0.1


def test_a_compiled_step(model_golden: dict[str, np.ndarray]) -> None:
    with counted_graphs() as graphs:
        step = golden_step(CPU, model_golden, parts="step")
    assert graphs["RetrievalTask"] == 1
    assert golden_step(CPU, model_golden).error(step) < 1e-4


def test_fused_updates(root: Path) -> None:
    assert optimizer_error(CPU, shipped_config("irra", root, "solver.lr=1e-3")) < 1e-5


def test_steps_without_waits(root: Path, tmp_path: Path) -> None:
    trainer = trainer_of(shipped_config("irra", root, "data.batch_size=8", "train.ema=0.9"), CPU, tmp_path)
    assert steps_without_waits(trainer) > 0


def test_gathered_rows() -> None:
    assert together(2, gathered, "cpu") == [([0.0, 1.0, 1.0], [2.0]), ([0.0, 1.0, 1.0], [4.0, 6.0])]


def test_speed(root: Path) -> None:
    found = speed(shipped_config("irra", root, "train.precision=bf16"), CPU, 4, steps=2)
    assert found.pairs_per_second > 0 and found.predicted > 0


def test_gpu_tests_are_collected_on_request_alone(request: pytest.FixtureRequest) -> None:
    found = [item.nodeid for item in request.session.items if item.nodeid.startswith("tests/gpu/")]
    assert not found or "gpu" in request.config.option.markexpr
