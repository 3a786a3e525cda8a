"""Averages and alarms that read the device only when they are asked, so that no step waits for a number."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from datasets.pairs import TrainPairs
from model.objectives import PartMean, Values
from utils.distributed import mean_of_processes
from utils.errors import TrainingError


class Meters:
    """Running means over pairs of the scalars of each step, summed on their own device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}

    def update(self, terms: Values, pairs: int) -> None:
        """`terms`: detached scalars, means over the `pairs` of one batch or over a part of them."""
        for name, value in terms.items():
            total, count = value if isinstance(value, PartMean) else (value.float() * pairs, pairs)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.counts[name] = self.counts.get(name, 0) + count

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.counts = {
            name: count.to(device) if isinstance(count, Tensor) else count for name, count in state["counts"].items()
        }

    def read(self) -> dict[str, float]:
        """The means so far, but for those over no pair at all. Waits for the device."""
        means = mean_of_processes(
            torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        ).tolist()
        read = dict(zip(self.sums, means, strict=True))
        return {name: mean for name, mean in read.items() if isinstance(self.counts[name], int) or not math.isnan(mean)}


class StepWatch:
    """Keeps the terms of the latest steps on the device until `check` looks whether they are finite."""

    def __init__(self, pairs: TrainPairs) -> None:
        self.pairs = pairs
        self.unchecked: list[tuple[int, dict[str, Tensor], Tensor]] = []

    def note(self, step: int, terms: Values, index: Tensor) -> None:
        """Terms of a step, `loss` among them, and the pairs of its batch (int64, on the CPU)."""
        whole = {name: value for name, value in terms.items() if isinstance(value, Tensor)}
        self.unchecked.append((step, whole, index))

    def check(self) -> None:
        """Look at all noted steps at once. Waits for the device.

        Raises:
            TrainingError: a loss is NaN or infinite; names the first such step, its terms and its images.
        """
        if not self.unchecked:
            return
        losses = torch.stack([terms["loss"] for _, terms, _ in self.unchecked]).tolist()
        for loss, (step, terms, index) in zip(losses, self.unchecked, strict=True):
            if not math.isfinite(loss):
                values = ", ".join(f"{name} = {float(value):.4g}" for name, value in terms.items())
                paths = sorted({self.pairs.pairs[i].record.image_path for i in index.tolist()})
                raise TrainingError(
                    f"step {step}: the loss is not finite ({values}). Try a lower solver.lr, train.clip_grad=1 or "
                    f"train.precision=fp32. The batch's images:\n  " + "\n  ".join(paths)
                )
        self.unchecked.clear()
