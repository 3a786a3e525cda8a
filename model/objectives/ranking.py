"""Losses to rank the caption of an image above the others of the batch by a margin, and vice versa."""

import math
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor

from model.objectives.base import OBJECTIVES, Margin, Metadata, Reduction, Step, reduce
from model.objectives.pair import PairObjective
from utils.options import Option

Negatives = Literal["hardest", "all"]


def tal_loss(
    image: Tensor,
    text: Tensor,
    pids: Tensor,
    *,
    tau: float = 0.015,
    margin: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """Triplet alignment loss of cosine similarities, see `triplet_alignment`.

    Args:
        image: (B, D), any norm.
        text: (B, D), any norm.
        pids: int64 (B,).
        tau: temperature.
        margin: margin between positives and negatives.
        reduction: "mean" -> scalar, "none" -> (B,), sum of both directions per pair.
    """
    return reduce(triplet_alignment(_cosines(image, text), pids, tau=tau, margin=margin), reduction)


def trl_loss(
    image: Tensor,
    text: Tensor,
    pids: Tensor,
    *,
    tau: float = 0.015,
    margin: float = 0.1,
    negatives: Negatives = "hardest",
    zero_floor: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Triplet ranking loss of cosine similarities, see `triplet_ranking`.

    Args:
        image: (B, D), any norm.
        text: (B, D), any norm.
        pids: int64 (B,).
        tau: temperature of the positive.
        margin: margin between positives and negatives.
        negatives: the hardest negative, or all of them.
        zero_floor: raise a hardest negative below 0 to 0.
        reduction: "mean" -> scalar, "none" -> (B,), sum of both directions per pair.
    """
    losses = triplet_ranking(
        _cosines(image, text), pids, tau=tau, margin=margin, negatives=negatives, zero_floor=zero_floor
    )
    return reduce(losses, reduction)


def triplet_alignment(scores: Tensor, pids: Tensor, *, tau: float = 0.015, margin: float = 0.1) -> Tensor:
    r"""Triplet alignment of each pair (Qin et al., CVPR 2024, https://arxiv.org/abs/2308.09911, section 3.3).

    $\max(0, m - P_i + \tau \log \sum_{j \in neg} \exp(X_{ij} / \tau))$, added up for the scores X and their
    transpose. $P_i$ is the mean of anchor i's positives, weighted by their softmax (constant). The log-sum-exp does not
    overflow at small tau, unlike the sum of the reference (docs/methods/rde.md#tal-triplet-alignment). An anchor
    without negatives has loss and gradient 0.

    Args:
        scores: (B, B), similarities of captions (rows) and images (columns).
        pids: int64 (B,).
        tau: temperature.
        margin: m.

    Returns:
        (B,), sum of both directions per pair.
    """
    same = pids[:, None] == pids[None, :]

    def direction(scores: Tensor) -> Tensor:
        negative = tau * (scores / tau).masked_fill(same, -math.inf).logsumexp(dim=1)  # -inf without negatives
        return F.relu(margin - _positive(scores, same, tau) + negative)

    return direction(scores) + direction(scores.T)


def triplet_ranking(
    scores: Tensor,
    pids: Tensor,
    *,
    tau: float = 0.015,
    margin: float = 0.1,
    negatives: Negatives = "hardest",
    zero_floor: bool = True,
) -> Tensor:
    """Triplet ranking of each pair, with the positive of triplet alignment (docs/methods/rde.md#trl-triplet-ranking).

    Args:
        scores: (B, B), similarities of captions (rows) and images (columns).
        pids: int64 (B,).
        tau: temperature of the positive.
        margin: margin between positives and negatives.
        negatives: the hardest one, or the sum over all of them (TRL-S in the paper's ablation).
        zero_floor: raise a hardest negative below 0 to 0. The reference does so, because it sets positives to 0 before
            it takes the maximum.

    Returns:
        (B,), sum of both directions per pair.
    """
    same = pids[:, None] == pids[None, :]

    def direction(scores: Tensor) -> Tensor:
        positive = _positive(scores, same, tau)
        if negatives == "all":
            return F.relu(margin - positive[:, None] + scores).masked_fill(same, 0).sum(dim=1)
        hardest = scores.masked_fill(same, 0 if zero_floor else -math.inf).amax(dim=1)
        return F.relu(margin - positive + hardest).masked_fill(same.all(dim=1), 0)

    return direction(scores) + direction(scores.T)


def _cosines(image: Tensor, text: Tensor) -> Tensor:
    return F.normalize(text) @ F.normalize(image).T


def _positive(scores: Tensor, same: Tensor, tau: float) -> Tensor:
    """Mean of each row's positives (B,), weighted by their softmax (constant)."""
    weights = (scores.detach() / tau).masked_fill(~same, -math.inf).softmax(dim=1)
    return (weights * scores).sum(dim=1)


class _Ranking(PairObjective):
    """A margin between positives and negatives, summed over the batch, as RDE's learning rate expects.

    Args:
        tau: temperature of the softmax over positives and of TAL's log-sum-exp.
        margin: margin between positives and negatives.
    """

    summed = True

    def __init__(
        self,
        metadata: Metadata,
        *,
        tau: Annotated[float, Option(gt=0)] = 0.015,
        margin: Margin = 0.1,
        **pair: Any,
    ) -> None:
        super().__init__(metadata, **pair)
        self.tau, self.margin = tau, margin


@OBJECTIVES.register("tal")
class TAL(_Ranking):
    """Triplet alignment of RDE, see `tal_loss`; summed over the batch."""

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return tal_loss(image, text, step.pids, tau=self.tau, margin=self.margin, reduction="none")


@OBJECTIVES.register("trl")
class TRL(_Ranking):
    """Triplet ranking of RDE's ablation, see `trl_loss`; summed over the batch.

    Args:
        negatives: the hardest negative, or all of them.
        zero_floor: raise a hardest negative below 0 to 0, as the reference does.
    """

    def __init__(
        self, metadata: Metadata, *, negatives: Negatives = "hardest", zero_floor: bool = True, **ranking: Any
    ) -> None:
        super().__init__(metadata, **ranking)
        self.negatives, self.zero_floor = negatives, zero_floor

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return trl_loss(
            image,
            text,
            step.pids,
            tau=self.tau,
            margin=self.margin,
            negatives=self.negatives,
            zero_floor=self.zero_floor,
            reduction="none",
        )
