"""Losses that match the images of a batch with its captions by their global embeddings."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.objectives.base import OBJECTIVES, Facts, Reduction, Step, reduce
from model.objectives.consensus import Fit
from model.objectives.pair import PairObjective
from utils.errors import ConfigError

Gap = Literal["cosine", "prob"]
Positive = Literal["first", "pair", "best"]
TargetNorm = Literal["l2", "sum"]


def sdm_loss(
    image: Tensor, text: Tensor, pids: Tensor, *, logit_scale: float, eps: float = 1e-8, reduction: Reduction = "mean"
) -> Tensor:
    r"""Similarity distribution matching (Jiang & Ye, CVPR 2023, eq. 2-5; IRRA model/objectives.py:compute_sdm).

    With $p_i$ the softmax over the batch of the scaled cosine similarities of anchor $i$ and $q_i$ uniform over the
    items of its identity, the mean of $KL(p_i \| q_i + eps)$ over image anchors plus that over caption anchors.

    Args:
        image, text: (B, D), any norm.
        pids: int64 (B,).
        logit_scale: 1/temperature.
        eps: added to q inside the logarithm.
        reduction: "mean" -> scalar, "none" -> (B,), both directions of each pair added.
    """
    logits = logit_scale * F.normalize(image) @ F.normalize(text).T
    same = _same_identity(pids, logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return reduce(_divergence(logits, target, eps) + _divergence(logits.T, target, eps), reduction)


def asdm_loss(
    image: Tensor,
    text: Tensor,
    pids: Tensor,
    *,
    logit_scale: float,
    alpha: float | Sequence[float] = 10.0,
    gap: Gap = "cosine",
    positive: Positive = "first",
    detach: bool = False,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Adaptive SDM (Yin et al., TOMM 2026, eq. 2; FMFA model/objectives.py).

    SDM with the divergence of each anchor multiplied by 1 + alpha * gap, where the gap is how far its positive is
    below its best candidate. Anchors whose positive is the best candidate count as in SDM. The paper measures the gap
    in softmax probabilities and against the pair itself; the code in cosines, against the first item of the batch
    that has the anchor's identity, with the gradient flowing through the weight (quirk Q28).

    Args:
        image, text: (B, D), any norm.
        pids: int64 (B,).
        logit_scale: 1/temperature.
        alpha: not negative; one number, or two: for image anchors and for caption anchors.
        gap: of cosines or of softmax probabilities.
        positive: the first item of the identity, the pair itself, or the identity's best item.
        detach: take the weights as constants.
        eps: as in `sdm_loss`.
        reduction: "mean" -> scalar, "none" -> (B,), both directions of each pair added.
    """
    cosine = F.normalize(image) @ F.normalize(text).T
    same = _same_identity(pids, cosine.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    total = cosine.new_zeros(len(cosine))
    for scores, factor in zip((cosine, cosine.T), _both_directions(alpha), strict=True):
        logits = logit_scale * scores
        weight = 1 + factor * _gap(scores if gap == "cosine" else logits.softmax(dim=1), same, positive)
        total = total + (weight.detach() if detach else weight) * _divergence(logits, target, eps)
    return reduce(total, reduction)


def itc_loss(image: Tensor, text: Tensor, *, logit_scale: float, reduction: Reduction = "mean") -> Tensor:
    """Image-text contrast: symmetric InfoNCE where only the pair itself is positive (Radford et al., ICML 2021).

    Args:
        image, text: (B, D), any norm.
        logit_scale: 1/temperature.
        reduction: "mean" -> scalar, "none" -> (B,), the mean of both directions of each pair.
    """
    logits = logit_scale * F.normalize(image) @ F.normalize(text).T
    pairs = torch.arange(len(logits), device=logits.device)
    i2t, t2i = (F.cross_entropy(scores, pairs, reduction="none") for scores in (logits, logits.T))
    return reduce((i2t + t2i) / 2, reduction)


def cmpm_loss(
    image: Tensor,
    text: Tensor,
    pids: Tensor,
    *,
    target_norm: TargetNorm = "l2",
    eps: float = 1e-8,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-modal projection matching (Zhang & Lu, ECCV 2018; IRRA model/objectives.py:compute_cmpm).

    Like SDM, but the logits are scalar projections onto the other modality's unit vectors (no temperature) and the
    target row is divided by its L2 norm, as in the original code, so it is no distribution (quirk Q7) and the loss may
    be negative; `target_norm` "sum" makes it one.

    Args:
        image, text: (B, D), not normalised.
        pids: int64 (B,).
        target_norm: what a target row is divided by.
        eps: added to the target inside the logarithm.
        reduction: "mean" -> scalar, "none" -> (B,), both directions of each pair added.
    """
    same = _same_identity(pids, image.dtype)
    target = same / (same.norm(dim=1, keepdim=True) if target_norm == "l2" else same.sum(dim=1, keepdim=True))
    i2t = _divergence(image @ F.normalize(text).T, target, eps)
    t2i = _divergence(text @ F.normalize(image).T, target, eps)
    return reduce(i2t + t2i, reduction)


def _same_identity(pids: Tensor, dtype: torch.dtype) -> Tensor:
    return (pids[:, None] == pids[None, :]).to(dtype)


def _both_directions(alpha: float | Sequence[float]) -> Sequence[float]:
    return alpha if isinstance(alpha, Sequence) else (alpha, alpha)


def _gap(scores: Tensor, same: Tensor, positive: Positive) -> Tensor:
    """How far the positive of each row is below the row's largest score, (B,)."""
    best = scores.max(dim=1).values
    if positive == "pair":
        return best - scores.diagonal()
    if positive == "best":
        return best - scores.masked_fill(same == 0, -math.inf).max(dim=1).values
    return best - scores.gather(1, same.argmax(dim=1, keepdim=True)).squeeze(1)


def _divergence(logits: Tensor, target: Tensor, eps: float) -> Tensor:
    """KL(softmax(logits) || target + eps) of each row, (B,)."""
    log_p = F.log_softmax(logits, dim=1)
    return (log_p.exp() * (log_p - torch.log(target + eps))).sum(dim=1)


@OBJECTIVES.register("sdm")
class SDM(PairObjective):
    """See `sdm_loss`."""

    def __init__(self, facts: Facts, *, weight: float = 1.0, eps: float = 1e-8, consensus: Fit | None = None) -> None:
        super().__init__(facts, weight=weight, consensus=consensus)
        self.eps = eps

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return sdm_loss(image, text, step.pids, logit_scale=step.logit_scale, eps=self.eps, reduction="none")


@OBJECTIVES.register("asdm")
class AdaptiveSDM(PairObjective):
    """See `asdm_loss`; the defaults are those of FMFA's first commit (8dfd532), which its published tables fit."""

    def __init__(
        self,
        facts: Facts,
        *,
        weight: float = 1.0,
        alpha: Any = 10.0,  # OmegaConf has no type for "a number or two of them"
        gap: Gap = "cosine",
        positive: Positive = "first",
        detach: bool = False,
        eps: float = 1e-8,
        consensus: Fit | None = None,
    ) -> None:
        super().__init__(facts, weight=weight, consensus=consensus)
        both = _both_directions(alpha)
        if len(both) != 2 or not all(type(number) in (int, float) and 0 <= number < math.inf for number in both):
            raise ConfigError(
                "losses.asdm.alpha: must be a number that is not negative, or two of them "
                f"(for image anchors, for caption anchors), is {alpha!r}"
            )
        self.options: dict[str, Any] = {
            "alpha": tuple(both),
            "gap": gap,
            "positive": positive,
            "detach": detach,
            "eps": eps,
        }

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return asdm_loss(image, text, step.pids, logit_scale=step.logit_scale, **self.options, reduction="none")


@OBJECTIVES.register("itc")
class ITC(PairObjective):
    """See `itc_loss`."""

    def __init__(self, facts: Facts, *, weight: float = 1.0, consensus: Fit | None = None) -> None:
        super().__init__(facts, weight=weight, consensus=consensus)

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return itc_loss(image, text, logit_scale=step.logit_scale, reduction="none")


@OBJECTIVES.register("cmpm")
class CMPM(PairObjective):
    """See `cmpm_loss`."""

    def __init__(
        self,
        facts: Facts,
        *,
        weight: float = 1.0,
        target_norm: TargetNorm = "l2",
        eps: float = 1e-8,
        consensus: Fit | None = None,
    ) -> None:
        super().__init__(facts, weight=weight, consensus=consensus)
        self.target_norm, self.eps = target_norm, eps

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return cmpm_loss(image, text, step.pids, target_norm=self.target_norm, eps=self.eps, reduction="none")
