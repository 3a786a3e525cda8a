"""Losses that have a value for each pair, so that pairs which look wrong can be left out, and told apart in the log."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from model.objectives.base import Facts, Objective, PartMean, Step, Values
from model.objectives.consensus import Fit, choose_fit, divide


class PairObjective(Objective):
    """The mean over pairs, or their sum, of what `per_pair` gives; added up where an encoder has several embeddings.

    With `consensus`, pairs whose loss looks like that of a wrong caption do not count: `divide` is told all pairs'
    losses before each epoch. The log gets the means over clean and noisy pairs where the batch knows which is which.

    Args:
        facts: sizes, and what is known of the noise.
        weight: of the loss.
        consensus: how closely the mixture is fitted that tells the pairs apart; None: all pairs count.
    """

    summed: ClassVar[bool] = False

    def __init__(self, facts: Facts, *, weight: float, consensus: Fit | None) -> None:
        super().__init__(weight=weight)
        self.fit = None if consensus is None else choose_fit(consensus, facts.noise_rate, facts.dataset)
        self.counted: Tensor | None = None  # bool (N,), whether each training pair counts in this epoch; not a weight

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        """The losses (B,) for one kind of embedding (B, D)."""
        raise NotImplementedError

    def pair_losses(self, step: Step) -> Tensor:
        """(K, B), for each kind of embedding."""
        return torch.stack([self.per_pair(image, text, step) for image, text in step.embeddings])

    def forward(self, step: Step) -> tuple[Tensor, Values]:
        losses = self.pair_losses(step).sum(dim=0)
        values: Values = {}
        if (clean := step.batch.get("clean")) is not None:
            for name, part in {"loss_clean": clean, "loss_noisy": ~clean}.items():
                values[name] = PartMean((losses.detach() * part).sum(), part.sum())
        if self.counted is None:
            return losses.sum() if self.summed else losses.mean(), values
        pairs = self.counted[step.batch["index"]]
        counted = pairs.repeat_interleave(len(losses) // len(pairs)).to(losses.dtype)  # a pair may have several rows
        total = (counted * losses).sum()
        return total if self.summed else total / counted.sum().clamp(min=1), values

    def divide(self, losses: Tensor, known: Tensor, rng: np.random.Generator) -> None:
        """Decide which of the N training pairs count from now on; see `consensus.divide`.

        Args:
            losses: (K, N), of each kind of embedding.
            known: bool (N,), the pairs that have a loss; the others count.
            rng: of what is left to chance.
        """
        assert self.fit is not None
        counted = torch.ones_like(known)
        counted[known] = torch.from_numpy(divide(losses[:, known].cpu().numpy(), self.fit, rng)).to(known.device)
        self.counted = counted
