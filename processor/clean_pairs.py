"""Before an epoch, the losses of all training pairs, for the objectives that choose by them which pairs count."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from datasets.loaders import TrainLoader
from model.objectives import PairObjective
from model.task import RetrievalTask
from utils.batch import to_device
from utils.logger import LOGGER, progress
from utils.precision import autocast


def divide_pairs(
    task: RetrievalTask, train: TrainLoader, epoch: int, *, seed: int, device: torch.device, precision: str
) -> dict[str, float]:
    """Let each objective with `consensus` choose the pairs that count in this epoch; returns the part that does.

    The part is also given of clean and of noisy pairs, where it is known which is which. Coins are thrown by seed and
    epoch alone. A pair whose image is skipped is not trained on, so it is not asked for either.

    Raises:
        TrainingError: a loss is not finite.
    """
    dividing = {name: objective for name, objective in pair_objectives(task).items() if objective.fit is not None}
    if not dividing:
        return {}
    losses, known = pair_losses(task, dividing, train, epoch, device=device, precision=precision)
    clean = torch.tensor(train.pairs.clean)
    values: dict[str, float] = {}
    for name, objective in dividing.items():
        objective.divide(losses[name], known, np.random.default_rng([seed, epoch]))
        assert objective.counted is not None
        counted = objective.counted.cpu().double()
        values[f"{name}_counted"] = float(counted.mean())
        if not clean.all():
            values[f"{name}_counted_clean"] = float(counted[clean].mean())
            values[f"{name}_counted_noisy"] = float(counted[~clean].mean())
    LOGGER.info("Epoch[%d] pairs that count: %s", epoch, ", ".join(f"{k}: {v:.4f}" for k, v in values.items()))
    return values


def pair_objectives(task: RetrievalTask) -> dict[str, PairObjective]:
    """The losses of a task that have a value for each pair."""
    return {name: module for name, module in task.named_objectives() if isinstance(module, PairObjective)}


@torch.no_grad()
def pair_losses(
    task: RetrievalTask,
    objectives: Mapping[str, PairObjective],
    train: TrainLoader,
    epoch: int,
    *,
    device: torch.device,
    precision: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """Each objective's losses (K, N) of the N training pairs, and which pairs they are known of, bool (N,).

    One pass in evaluation mode over augmented, shuffled batches, which are others than those the epoch trains on.
    """
    task.eval()
    num_pairs = len(train.pairs)
    losses: dict[str, Tensor] = {}
    known = torch.zeros(num_pairs, dtype=torch.bool, device=device)
    for batch in progress(train.every_pair(epoch), f"dividing pairs, epoch {epoch}"):
        batch = to_device(batch, device)
        with autocast(device, precision):
            step = task.encode(batch)
        index = step.batch["index"]  # of the whole batch: every process has all losses, and decides the same
        known[index] = True
        for name, objective in objectives.items():
            found = objective.pair_losses(step)
            table = losses.setdefault(name, found.new_zeros(len(found), num_pairs))
            table[:, index] = found.unflatten(1, (len(index), -1)).mean(dim=2)  # a pair may have several rows
    return losses, known
