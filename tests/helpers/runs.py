"""Runs: their records, interruption after a given checkpoint, and comparison of two run folders."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from processor import saving as saving_module
from processor.timing import BESIDE, PARTS
from utils.checkpoint import load_checkpoint, save_checkpoint

FAST = ["train.epochs=5", "solver.lr=2e-4", "solver.eps=1e-6", "solver.schedule.warmup_epochs=1", "train.log_every=1"]
TIMING = ("seconds", "samples_per_second", "peak_memory_gib", "mfu")
TIMING += tuple(f"{part}_ms" for part in PARTS) + tuple(f"{what}_seconds" for what in BESIDE)


def lines_of(run: Path) -> list[dict]:
    """Records in metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Exception in place of a kill signal, within one process."""


def die_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Raise `Killed` right after this number of writes of last.pt."""
    count = iter(range(1, 10**6))

    def save(path: Path, content: Any) -> None:
        save_checkpoint(path, content)
        if Path(path).name == "last.pt" and next(count) == saves:
            raise Killed

    monkeypatch.setattr(saving_module, "save_checkpoint", save)


def same(a: Any, b: Any, path: str = "") -> None:
    """Assert bitwise equality of everything but timings."""
    if isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            if key not in TIMING:
                same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{number}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def nearly_same(found: Any, expected: Any, path: str = "") -> None:
    """Assert the same structure and shapes, and floats that differ by rounding; counts and draws may differ."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), path
        for key, value in expected.items():
            nearly_same(found[key], value, f"{path}.{key}")
    elif isinstance(expected, Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype, path
        if expected.is_floating_point() and "random" not in path:  # Adam enlarges the rounding of small gradients
            error, size = ((value.double().abs().mean()) for value in (found - expected, expected))
            assert error <= 0.02 * size + 1e-4, path


def same_runs(straight: Path, resumed: Path) -> None:
    """Assert that two run folders hold the same checkpoints, metrics and log lines."""
    names = sorted(path.name for path in straight.glob("*.pt"))
    assert names == sorted(path.name for path in resumed.glob("*.pt"))
    for name in names:
        same(load_checkpoint(straight / name), load_checkpoint(resumed / name), name)
    same(
        *(
            [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (straight, resumed)
        )
    )
    same(*(training_lines(run) for run in (straight, resumed)))


def training_lines(run: Path) -> list[str]:
    """Log lines about steps and evaluations, without duplicates and timings."""
    lines = re.findall(r"Epoch\[\d+\].*|\| t2i .*|best R1.*", (run / "train.log").read_text())
    return list(dict.fromkeys(lines))
