"""Losses to match the images of a batch with its captions by their global embeddings."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.objectives.base import OBJECTIVES, Metadata, Reduction, Step, reduce
from model.objectives.pair import PairObjective
from utils.options import Option

Gap = Literal["cosine", "prob"]
Positive = Literal["first", "pair", "best"]
TargetNorm = Literal["l2", "sum"]
Epsilon = Annotated[float, Option(gt=0)]


def sdm_loss(
    image: Tensor, text: Tensor, pids: Tensor, *, logit_scale: float, eps: float = 1e-8, reduction: Reduction = "mean"
) -> Tensor:
    r"""Similarity distribution matching (Jiang & Ye, CVPR 2023, https://arxiv.org/abs/2303.12501, section 3.3).

    Let $p_i$ be the softmax over the batch of the scaled cosine similarities of anchor $i$, and $q_i$ be uniform over
    the items of its identity. The loss is the mean of $KL(p_i \| q_i + eps)$ over image anchors plus that over caption
    anchors (anosorae/IRRA@cfc2378:model/objectives.py:compute_sdm).

    Args:
        image: (B, D), any norm.
        text: (B, D), any norm.
        pids: int64 (B,).
        logit_scale: 1/temperature.
        eps: term added to q inside the logarithm.
        reduction: "mean" -> scalar, "none" -> (B,), sum of both directions per pair.
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
    r"""Adaptive SDM (Yin et al., TOMM 2026, https://arxiv.org/abs/2509.13754, eq. 2).

    SDM with the divergence of each anchor multiplied by 1 + alpha * gap. The gap is the distance between its positive
    and its best candidate, so anchors that rank their positive first count as in SDM. The paper measures the gap in
    softmax probabilities, with the pair itself as positive. The code (yinhao1102/FMFA@8dfd532:model/objectives.py)
    measures it in cosines, with the first item of the identity as positive, and backpropagates through the weight.

    Args:
        image: (B, D), any norm.
        text: (B, D), any norm.
        pids: int64 (B,).
        logit_scale: 1/temperature.
        alpha: not negative; one number, or two for image anchors and caption anchors.
        gap: in cosines or in softmax probabilities.
        positive: the first item of the identity, the pair itself, or the identity's best item.
        detach: treat the weights as constants.
        eps: term added to q inside the logarithm.
        reduction: "mean" -> scalar, "none" -> (B,), sum of both directions per pair.
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
    """Image-text contrast: symmetric InfoNCE with the pair itself as only positive.

    The loss of CLIP (Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020).

    Args:
        image: (B, D), any norm.
        text: (B, D), any norm.
        logit_scale: 1/temperature.
        reduction: "mean" -> scalar, "none" -> (B,), mean of both directions per pair.
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
    r"""Cross-modal projection matching (Zhang & Lu, ECCV 2018).

    SDM with scalar projections onto the other modality's unit vectors as logits, without temperature. The original code
    divides target rows by their L2 norm (anosorae/IRRA@cfc2378:model/objectives.py:compute_cmpm). They are no
    distributions then, and the loss may be negative.

    Args:
        image: (B, D), not normalised.
        text: (B, D), not normalised.
        pids: int64 (B,).
        target_norm: norm that target rows are divided by; "sum" makes them distributions.
        eps: term added to the target inside the logarithm.
        reduction: "mean" -> scalar, "none" -> (B,), sum of both directions per pair.
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
    """Distance of each row's positive below the row's largest score, (B,)."""
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
    """Similarity distribution matching of IRRA, see `sdm_loss`.

    Args:
        eps: term added to the target inside the logarithm.
    """

    def __init__(self, metadata: Metadata, *, eps: Epsilon = 1e-8, **pair: Any) -> None:
        super().__init__(metadata, **pair)
        self.eps = eps

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return sdm_loss(image, text, step.pids, logit_scale=step.logit_scale, eps=self.eps, reduction="none")


@OBJECTIVES.register("asdm")
class AdaptiveSDM(PairObjective):
    """Adaptive SDM of FMFA, see `asdm_loss`.

    The defaults are those of the first commit (yinhao1102/FMFA@8dfd532), which the published tables fit.

    Args:
        alpha: factor of the gap; one number, or two for image anchors and caption anchors.
        gap: gap in cosines or in softmax probabilities.
        positive: the first item of the identity, the pair itself, or the identity's best item.
        detach: treat the weights as constants.
        eps: term added to the target inside the logarithm.
    """

    def __init__(
        self,
        metadata: Metadata,
        *,
        alpha: Annotated[float | tuple[float, float], Option(ge=0)] = 10.0,
        gap: Gap = "cosine",
        positive: Positive = "first",
        detach: bool = False,
        eps: Epsilon = 1e-8,
        **pair: Any,
    ) -> None:
        super().__init__(metadata, **pair)
        self.options: dict[str, Any] = {
            "alpha": alpha,
            "gap": gap,
            "positive": positive,
            "detach": detach,
            "eps": eps,
        }

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return asdm_loss(image, text, step.pids, logit_scale=step.logit_scale, **self.options, reduction="none")


@OBJECTIVES.register("itc")
class ITC(PairObjective):
    """Symmetric InfoNCE of CLIP, see `itc_loss`."""

    def __init__(self, metadata: Metadata, **pair: Any) -> None:
        super().__init__(metadata, **pair)

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return itc_loss(image, text, logit_scale=step.logit_scale, reduction="none")


@OBJECTIVES.register("cmpm")
class CMPM(PairObjective):
    """Cross-modal projection matching of IVT, see `cmpm_loss`.

    Args:
        target_norm: norm that target rows are divided by; sum makes them distributions.
        eps: term added to the target inside the logarithm.
    """

    def __init__(self, metadata: Metadata, *, target_norm: TargetNorm = "l2", eps: Epsilon = 1e-8, **pair: Any) -> None:
        super().__init__(metadata, **pair)
        self.target_norm, self.eps = target_norm, eps

    def per_pair(self, image: Tensor, text: Tensor, step: Step) -> Tensor:
        return cmpm_loss(image, text, step.pids, target_norm=self.target_norm, eps=self.eps, reduction="none")
