"""Base class of losses with one value per pair, with an option to leave out noisy pairs."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from model.objectives.base import EpochContext, MaskedMean, Metadata, Metrics, Objective, Step, Weight
from model.objectives.consensus import Fit, choose_fit, divide


class PairObjective(Objective):
    """The mean or the sum over pairs of `per_pair`, added up over the encoder's embeddings.

    With `consensus`, the training pairs are divided into clean and noisy ones before each epoch, and only clean ones
    are trained on. If the batch knows which captions noise replaced, the log shows the mean loss of both groups.

    Args:
        weight: weight of the loss; 0 only logs it.
        consensus: fit of the mixture that divides the pairs; null trains on all pairs.
    """

    summed: ClassVar[bool] = False

    def __init__(self, metadata: Metadata, *, weight: Weight = 1.0, consensus: Fit | None = None) -> None:
        super().__init__(weight=weight)
        self.fit = None if consensus is None else choose_fit(consensus, metadata.noise_rate, metadata.dataset)
        self.clean_mask: Tensor | None = None  # bool (N,), training pairs that count in this epoch; not a weight

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        """The losses (B,) of one kind of embedding (B, D)."""
        raise NotImplementedError

    def pair_losses(self, step: Step) -> Tensor:
        """The losses (K, B) of all K kinds of embeddings."""
        return torch.stack([self.per_pair(image, text, step) for image, text in step.embeddings])

    def forward(self, step: Step) -> tuple[Tensor, Metrics]:
        losses = self.pair_losses(step).sum(dim=0)
        metrics: Metrics = {}
        if (clean := step.batch.get("clean")) is not None:
            for name, group in {"loss_clean": clean, "loss_noisy": ~clean}.items():
                metrics[name] = MaskedMean((losses.detach() * group).sum(), group.sum())
        if self.clean_mask is None:
            return losses.sum() if self.summed else losses.mean(), metrics
        mask = self.clean_mask[step.batch["index"]].to(losses.dtype)
        total = (mask * losses).sum()
        return total if self.summed else total / mask.sum().clamp(min=1), metrics

    def before_epoch(self, context: EpochContext) -> dict[str, float]:
        """Divide the training pairs; returns the fraction that counts, also among clean and among noisy ones.

        Pairs without a loss, because their image was skipped, count.
        """
        if self.fit is None:
            return {}
        losses, seen = context.pair_losses(self)
        mask = torch.ones_like(seen)
        divided = divide(losses[:, seen].cpu().numpy(), self.fit, context.rng())
        mask[seen] = torch.from_numpy(divided).to(seen.device)
        self.clean_mask = mask
        counted, clean = mask.cpu().double(), torch.from_numpy(context.clean)
        metrics = {"counted": float(counted.mean())}
        if not clean.all():
            metrics |= {"counted_clean": float(counted[clean].mean()), "counted_noisy": float(counted[~clean].mean())}
        return metrics

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.clean_mask is None else {"clean_mask": self.clean_mask}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.clean_mask = state.get("clean_mask")
