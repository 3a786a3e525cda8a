"""Losses that rank the caption of an image above the others of the batch by a margin, and the other way round."""

import math
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from model.objectives.base import OBJECTIVES, Facts, Step
from model.objectives.consensus import Fit
from model.objectives.pair import PairObjective
from utils.errors import ConfigError

Negatives = Literal["hardest", "all"]


def tal_loss(scores: Tensor, pids: Tensor, *, tau: float = 0.015, margin: float = 0.1) -> Tensor:
    r"""Triplet alignment loss of each pair (Qin et al., CVPR 2024, eq. 8; RDE model/objectives.py:compute_TAL_per).

    $\max(0, m - P_i + \tau \log \sum_{j \in neg} \exp(X_{ij} / \tau))$ for X the scores and their transpose, added,
    with $P_i$ the mean of anchor i's positives weighted by their softmax (constant). The log-sum-exp does not
    overflow, as the reference's does at small tau. An anchor without negatives has loss and gradient 0.

    Args:
        scores: (B, B), cosine similarities of captions (rows) and images (columns).
        pids: int64 (B,).
        tau: temperature.
        margin: m.

    Returns:
        (B,).
    """
    same = pids[:, None] == pids[None, :]

    def direction(scores: Tensor) -> Tensor:
        negative = tau * (scores / tau).masked_fill(same, -math.inf).logsumexp(dim=1)  # -inf where there is none
        return F.relu(margin - _positive(scores, same, tau) + negative)

    return direction(scores) + direction(scores.T)


def trl_loss(
    scores: Tensor,
    pids: Tensor,
    *,
    tau: float = 0.015,
    margin: float = 0.1,
    negatives: Negatives = "hardest",
    zero_floor: bool = True,
) -> Tensor:
    """Triplet ranking loss of each pair, with TAL's positive (RDE model/objectives.py:compute_TRL_per; RDE spec 4.2).

    Args:
        scores, pids, tau, margin: as in `tal_loss`.
        negatives: the hardest one, or the sum over all of them (TRL-S in the paper's ablation).
        zero_floor: the hardest negative counts as 0 where it is below, as in the reference, which puts 0 in the
            place of positives before it looks for the largest.

    Returns:
        (B,).
    """
    same = pids[:, None] == pids[None, :]

    def direction(scores: Tensor) -> Tensor:
        positive = _positive(scores, same, tau)
        if negatives == "all":
            return F.relu(margin - positive[:, None] + scores).masked_fill(same, 0).sum(dim=1)
        hardest = scores.masked_fill(same, 0 if zero_floor else -math.inf).amax(dim=1)
        return F.relu(margin - positive + hardest).masked_fill(same.all(dim=1), 0)

    return direction(scores) + direction(scores.T)


def _positive(scores: Tensor, same: Tensor, tau: float) -> Tensor:
    """Mean (B,) of each row's positives, weighted by their softmax, which gets no gradient."""
    weights = (scores.detach() / tau).masked_fill(~same, -math.inf).softmax(dim=1)
    return (weights * scores).sum(dim=1)


def _cosines(image: Tensor, text: Tensor) -> Tensor:
    return F.normalize(text) @ F.normalize(image).T


class _Ranking(PairObjective):
    """A margin between positives and negatives; summed over the batch, as RDE's learning rate expects."""

    summed = True
    name: ClassVar[str]

    def __init__(
        self,
        facts: Facts,
        *,
        weight: float = 1.0,
        tau: float = 0.015,
        margin: float = 0.1,
        consensus: Fit | None = None,
    ) -> None:
        super().__init__(facts, weight=weight, consensus=consensus)
        if not 0 < tau < math.inf:
            raise ConfigError(f"losses.{self.name}.tau: must be above 0, is {tau}")
        self.tau, self.margin = tau, margin


@OBJECTIVES.register("tal")
class TAL(_Ranking):
    """See `tal_loss`."""

    name = "tal"

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return tal_loss(_cosines(image, text), step.pids, tau=self.tau, margin=self.margin)


@OBJECTIVES.register("trl")
class TRL(_Ranking):
    """See `trl_loss`."""

    name = "trl"

    def __init__(
        self, facts: Facts, *, negatives: Negatives = "hardest", zero_floor: bool = True, **options: Any
    ) -> None:
        super().__init__(facts, **options)
        self.negatives, self.zero_floor = negatives, zero_floor

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return trl_loss(
            _cosines(image, text),
            step.pids,
            tau=self.tau,
            margin=self.margin,
            negatives=self.negatives,
            zero_floor=self.zero_floor,
        )
