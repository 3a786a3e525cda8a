"""Averages and alarms that read the device only when they are asked, so that no step waits for a number."""

import math

import torch
from torch import Tensor

from datasets.pairs import TrainPairs
from utils.errors import TrainingError


class Meters:
    """Running means over pairs of the scalars of each step, summed on their own device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def update(self, terms: dict[str, Tensor], pairs: int) -> None:
        """`terms`: detached scalars, means over the `pairs` of one batch."""
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value.float() * pairs if name in self.sums else value.float() * pairs
        self.count += pairs

    def read(self) -> dict[str, float]:
        """The means so far. Waits for the device."""
        values = torch.stack(list(self.sums.values())).tolist()
        return {name: value / self.count for name, value in zip(self.sums, values, strict=True)}


class StepWatch:
    """Keeps the terms of the latest steps on the device until `check` looks whether they are finite."""

    def __init__(self, pairs: TrainPairs) -> None:
        self.pairs = pairs
        self.unchecked: list[tuple[int, dict[str, Tensor], Tensor]] = []

    def note(self, step: int, terms: dict[str, Tensor], index: Tensor) -> None:
        """Terms of a step, `loss` among them, and the pairs of its batch (int64, on the CPU)."""
        self.unchecked.append((step, terms, index))

    def check(self) -> None:
        """Look at all noted steps at once. Waits for the device.

        Raises:
            TrainingError: a loss is NaN or infinite; names the first such step, its terms and its images.
        """
        losses = torch.stack([terms["loss"] for _, terms, _ in self.unchecked]).tolist()
        for loss, (step, terms, index) in zip(losses, self.unchecked, strict=True):
            if not math.isfinite(loss):
                values = ", ".join(f"{name} = {float(value):.4g}" for name, value in terms.items())
                paths = sorted({self.pairs.pairs[i][0].image_path for i in index.tolist()})
                raise TrainingError(
                    f"step {step}: the loss is not finite ({values}). Try a lower solver.lr, train.clip_grad=1 or "
                    f"train.precision=fp32. The batch's images:\n  " + "\n  ".join(paths)
                )
        self.unchecked.clear()
