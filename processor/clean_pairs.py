"""Losses of all training pairs before an epoch, to divide the pairs into clean and noisy ones."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.loaders import TrainLoader
from model.objectives import Objective, PairObjective
from model.task import RetrievalTask
from processor.passes import Passes, ReplicatedPasses
from utils.logger import LOGGER, progress
from utils.precision import autocast


class PairLosses:
    """The `EpochContext` of an epoch: computes the losses of all training pairs when the first objective asks.

    Args:
        task: the task that is trained.
        train: training batches.
        epoch: number of the coming epoch.
        seed: seed of the run.
        device: device of the task.
        precision: autocast precision.
        passes: forward passes of the task on several processes; None for one.
    """

    def __init__(
        self,
        task: RetrievalTask,
        train: TrainLoader,
        epoch: int,
        *,
        seed: int,
        device: torch.device,
        precision: str,
        passes: Passes | ReplicatedPasses | None = None,
    ) -> None:
        self.task, self.train, self.epoch, self.seed = task, train, epoch, seed
        self.device, self.precision, self.passes = device, precision, passes or Passes(task)
        self.clean = np.array(train.pairs.clean)
        self._losses: dict[Objective, Tensor] = {}  # (K, N) each
        self._seen: Tensor | None = None  # bool (N,)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch])

    def pair_losses(self, objective: Objective) -> tuple[Tensor, Tensor]:
        if self._seen is None:
            self._compute()
        assert self._seen is not None
        return self._losses[objective], self._seen

    @torch.no_grad()
    def _compute(self) -> None:
        """One pass in evaluation mode over augmented, shuffled batches, drawn apart from those of the epoch."""
        self.task.eval()
        objectives = [module for _, module in self.task.named_objectives() if isinstance(module, PairObjective)]
        num_pairs = len(self.train.pairs)
        seen = torch.zeros(num_pairs, dtype=torch.bool, device=self.device)
        for micro_batch in progress(self.train.every_pair(self.epoch), f"losses of all pairs, epoch {self.epoch}"):
            fields, shard = micro_batch.to(self.device)
            with autocast(self.device, self.precision):
                step = self.passes(self.task.gathered_step, fields, shard)
            index = shard.per_pair(step.batch["index"])[:, 0]  # gathered, so that all processes divide alike
            seen[index] = True
            for objective in objectives:
                losses = objective.pair_losses(step)
                table = self._losses.setdefault(objective, losses.new_zeros(len(losses), num_pairs))
                table[:, index] = shard.per_pair(losses).mean(dim=2)
        self._seen = seen


def before_epoch(task: RetrievalTask, train: TrainLoader, epoch: int, **more: Any) -> dict[str, float]:
    """Run the `before_epoch` hook of every objective; returns their metrics, named after the objective.

    The arguments are those of `PairLosses`.
    """
    context = PairLosses(task, train, epoch, **more)
    metrics = {
        f"{name}_{key}": value
        for name, objective in task.named_objectives()
        for key, value in objective.before_epoch(context).items()
    }
    if metrics:
        values = ", ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
        LOGGER.info("Epoch[%d] before training: %s", epoch, values)
    return metrics
