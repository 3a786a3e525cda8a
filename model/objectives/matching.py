"""Losses that match the images of a batch with its captions by their global embeddings."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.objectives.base import OBJECTIVES, Facts, Objective, Step

Reduction = Literal["mean", "none"]


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
    return _reduce(_divergence(logits, target, eps) + _divergence(logits.T, target, eps), reduction)


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
    return _reduce((i2t + t2i) / 2, reduction)


def cmpm_loss(image: Tensor, text: Tensor, pids: Tensor, *, eps: float = 1e-8, reduction: Reduction = "mean") -> Tensor:
    r"""Cross-modal projection matching (Zhang & Lu, ECCV 2018; IRRA model/objectives.py:compute_cmpm).

    Like SDM, but the logits are scalar projections onto the other modality's unit vectors (no temperature) and the
    target row is divided by its L2 norm, as in the original code, so it is no distribution (quirk Q7).

    Args:
        image, text: (B, D), not normalised.
        pids: int64 (B,).
        eps: added to the target inside the logarithm.
        reduction: "mean" -> scalar, "none" -> (B,), both directions of each pair added.
    """
    same = _same_identity(pids, image.dtype)
    target = same / same.norm(dim=1, keepdim=True)
    i2t = _divergence(image @ F.normalize(text).T, target, eps)
    t2i = _divergence(text @ F.normalize(image).T, target, eps)
    return _reduce(i2t + t2i, reduction)


def _same_identity(pids: Tensor, dtype: torch.dtype) -> Tensor:
    return (pids[:, None] == pids[None, :]).to(dtype)


def _divergence(logits: Tensor, target: Tensor, eps: float) -> Tensor:
    """KL(softmax(logits) || target + eps) of each row, (B,)."""
    log_p = F.log_softmax(logits, dim=1)
    return (log_p.exp() * (log_p - torch.log(target + eps))).sum(dim=1)


def _reduce(per_pair: Tensor, reduction: Reduction) -> Tensor:
    return per_pair.mean() if reduction == "mean" else per_pair


@OBJECTIVES.register("sdm")
class SDM(Objective):
    """See `sdm_loss`."""

    def __init__(self, facts: Facts, *, weight: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__(weight=weight)
        self.eps = eps

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return sdm_loss(step.image, step.text, step.pids, logit_scale=step.logit_scale, eps=self.eps), {}


@OBJECTIVES.register("itc")
class ITC(Objective):
    """See `itc_loss`."""

    def __init__(self, facts: Facts, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return itc_loss(step.image, step.text, logit_scale=step.logit_scale), {}


@OBJECTIVES.register("cmpm")
class CMPM(Objective):
    """See `cmpm_loss`."""

    def __init__(self, facts: Facts, *, weight: float = 1.0, eps: float = 1e-8) -> None:
        super().__init__(weight=weight)
        self.eps = eps

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return cmpm_loss(step.image, step.text, step.pids, eps=self.eps), {}
