"""Running means and a NaN check without a device sync per step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from datasets.pairs import TrainPairs
from model.objectives import MaskedMean, Metrics
from utils.distributed import mean_over_processes
from utils.errors import TrainingError


class Meters:
    """Running means over pairs of the metrics of each step, summed on their device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}

    def update(self, metrics: Metrics, pairs: int) -> None:
        """Add a step.

        Args:
            metrics: detached scalars, means over the batch or masked means.
            pairs: number of pairs in the batch.
        """
        for name, value in metrics.items():
            total, count = value if isinstance(value, MaskedMean) else (value.float() * pairs, pairs)
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
        """The means so far, without masked means over no pair. Syncs the device."""
        means = mean_over_processes(
            torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        ).tolist()
        read = dict(zip(self.sums, means, strict=True))
        return {name: mean for name, mean in read.items() if isinstance(self.counts[name], int) or not math.isnan(mean)}


class NaNCheck:
    """Keeps the metrics of recent steps on the device until `check` tests whether the losses are finite.

    Args:
        pairs: training pairs, to name the images of a batch.
    """

    def __init__(self, pairs: TrainPairs) -> None:
        self.pairs = pairs
        self.unchecked: list[tuple[int, dict[str, Tensor], Tensor]] = []

    def note(self, step: int, metrics: Metrics, index: Tensor) -> None:
        """Add a step.

        Args:
            step: number of the step.
            metrics: metrics of the step, `loss` among them.
            index: training pairs of the batch, int64 on the CPU.
        """
        scalars = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        self.unchecked.append((step, scalars, index))

    def check(self) -> None:
        """Check all noted steps at once. Syncs the device.

        Raises:
            TrainingError: a loss is not finite; names the first such step, its metrics and its images.
        """
        if not self.unchecked:
            return
        losses = torch.stack([metrics["loss"] for _, metrics, _ in self.unchecked]).tolist()
        for loss, (step, metrics, index) in zip(losses, self.unchecked, strict=True):
            if not math.isfinite(loss):
                values = ", ".join(f"{name} = {float(value):.4g}" for name, value in metrics.items())
                paths = sorted({self.pairs.pairs[i].record.image_path for i in index.tolist()})
                raise TrainingError(
                    f"step {step}: the loss is not finite ({values}). Try a lower solver.lr, train.clip_grad=1 or "
                    f"train.precision=fp32. Images of the batch:\n  " + "\n  ".join(paths)
                )
        self.unchecked.clear()
