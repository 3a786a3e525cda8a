"""Explicit fine-grained alignment: caption tokens aggregate patches, then tokens are matched across the batch."""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.objectives.base import OBJECTIVES, Margin, Metadata, Metrics, Objective, Reduction, Step, Weight, reduce
from utils.batch import caption_mask
from utils.options import Option
from utils.precision import precise

Variant = Literal["code", "paper"]
EPS = 1e-6  # smallest denominator, for a token with equal scores for all patches or without any patch
BLOCK = 2**23  # similarities that `best_matches` holds at a time: 32 MB in fp32


def sparse_weights(text_tokens: Tensor, patches: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Sparse weights of the patches of an image for each token of its caption.

    The inner products of a token are scaled to 0..1 over the patches. Those up to sigma / N become 0, and the rest is
    divided by its sum (Yin et al., TOMM 2026, https://arxiv.org/abs/2509.13754, eq. 5-7).

    Args:
        text_tokens: (B, L, D), not normalised.
        patches: (B, N, D), not normalised, without the class token.
        sigma: threshold in units of 1/N.

    Returns:
        (B, L, N). Rows sum to 1; a row is 0 if a token has equal scores for all patches.
    """
    scores = text_tokens @ patches.transpose(1, 2)
    low, high = scores.amin(dim=2, keepdim=True), scores.amax(dim=2, keepdim=True)
    scaled = (scores - low) / (high - low).clamp(min=EPS)
    kept = torch.where(scaled > sigma / patches.shape[1], scaled, 0)
    return kept / kept.sum(dim=2, keepdim=True).clamp(min=EPS)


def sparse_aggregate(text_tokens: Tensor, patches: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Joint embeddings (B, L, D): the patches of an image aggregated for each token of its caption.

    Args:
        text_tokens: (B, L, D), not normalised.
        patches: (B, N, D), not normalised, without the class token.
        sigma: threshold of `sparse_weights`.
    """
    return sparse_weights(text_tokens, patches, sigma=sigma) @ patches


def best_matches(tokens: Tensor, joint: Tensor, valid: Tensor | None = None) -> Tensor:
    """Largest inner product of each token k of item i with a token of item j, for all pairs (i, j) of the batch.

    The (B, B, K, L) inner products are never held at once, in neither direction. Only the positions of the largest ones
    are kept, and the gradient is that of their products.

    Args:
        tokens: (B, K, D).
        joint: (B, L, D).
        valid: bool (B, L), tokens of `joint` to consider, at least one per row; None considers all.

    Returns:
        (B, B, K).
    """
    best: Tensor = _BestMatches.apply(tokens, joint, valid)
    return best


class _BestMatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, joint: Tensor, valid: Tensor | None) -> Tensor:
        pairs, length = joint.shape[:2]
        flat = tokens.flatten(0, 1)  # (B K, D)
        size = max(1, BLOCK // (len(flat) * length))
        best, places = [], []
        for start in range(0, pairs, size):
            block = slice(start, start + size)
            scores = (flat @ joint[block].flatten(0, 1).T).unflatten(1, (-1, length))  # (B K, size, L)
            if valid is not None:
                scores.masked_fill_(~valid[block], -math.inf)
            value, place = scores.max(dim=2)
            best.append(value)
            places.append(place)
        first = length * torch.arange(pairs, device=joint.device)
        rows = torch.cat(places, dim=1) + first  # (B K, B), of joint as (B L, D)
        ctx.save_for_backward(tokens, joint, rows)
        values: Tensor = torch.cat(best, dim=1).unflatten(0, tokens.shape[:2]).transpose(1, 2)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Sums over the selected rows only: one of L products has a gradient."""
        tokens, joint, rows = ctx.saved_tensors
        flat, flat_joint, weights = tokens.flatten(0, 1), joint.flatten(0, 1), grad.transpose(1, 2).flatten(0, 1)
        grad_tokens = F.embedding_bag(rows, flat_joint, mode="sum", per_sample_weights=weights)
        ordered, order = rows.flatten().sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(len(flat_joint), device=rows.device))  # bincount would sync
        grad_joint = F.embedding_bag(
            order // rows.shape[1],
            flat,
            starts,
            mode="sum",
            per_sample_weights=weights.flatten()[order],
        )
        return grad_tokens.view_as(tokens), grad_joint.view_as(joint), None


def efa_loss(
    text_tokens: Tensor,
    patches: Tensor,
    *,
    margin_text: float,
    margin_image: float,
    temperature: float = 1.0,
    sigma: float = 1.0,
    variant: Variant = "code",
    text_mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Explicit fine-grained alignment (Yin et al., TOMM 2026, https://arxiv.org/abs/2509.13754, eq. 5-12).

    Let $E$ be the joint embeddings of `sparse_aggregate`, and $X$ the caption tokens or the patches. The similarity of
    items i and j is $S_{ij} = t \log \sum_l \exp(\max_m \cos(X_i[l], E_j[m]) / t)$. The loss adds up both kinds of X.

    * code (yinhao1102/FMFA@8dfd532:model/objectives.py): rows of S are divided by their L2 norm. For each j, the terms
      are $\log \sum_i \exp(S_{ij} - S_{ii} + m)$ and $\log \sum_i \exp(S_{ij} - S_{jj} + m)$, where i = j counts as
      exp(0). The first sum runs over anchors, so the loss stays near $2 \ln(1 + (B - 1) e^m)$ for each margin, as in
      the authors' logs.
    * paper: S is not normalised, and the sums run over the negatives of an anchor:
      $\log \sum_{j \ne i} \exp(S_{ij} - S_{ii} + m)$ and $\log \sum_{i \ne j} \exp(S_{ij} - S_{jj} + m)$. A batch of
      one pair has no negatives and loss 0.

    Args:
        text_tokens: (B, L, D), not normalised, padding included unless masked.
        patches: (B, N, D), not normalised, without the class token.
        margin_text: m where X are caption tokens.
        margin_image: m where X are patches.
        temperature: t, the paper's 1/lambda; smaller is nearer to the maximum over l.
        sigma: threshold of the aggregation in units of 1/N.
        variant: code or paper.
        text_mask: bool (B, L), caption tokens to consider, at least one per row; None considers all, as the code does.
        reduction: "mean" -> scalar, "none" -> (B,).
    """
    joint = sparse_aggregate(text_tokens, patches, sigma=sigma)
    by_text = token_similarity(text_tokens, joint, temperature, text_mask, text_mask)
    by_image = token_similarity(patches, joint, temperature, None, text_mask)
    return reduce(alignment(by_text, margin_text, variant) + alignment(by_image, margin_image, variant), reduction)


def token_similarity(
    tokens: Tensor, joint: Tensor, temperature: float, mask: Tensor | None = None, joint_mask: Tensor | None = None
) -> Tensor:
    """The similarities S of `efa_loss`, (B, B).

    Args:
        tokens: X, (B, K, D).
        joint: E, (B, L, D).
        temperature: t.
        mask: bool (B, K), tokens to consider.
        joint_mask: bool (B, L), joint embeddings to consider.
    """
    best = best_matches(F.normalize(tokens, dim=2, eps=EPS), F.normalize(joint, dim=2, eps=EPS), joint_mask)
    if mask is not None:
        best = best.masked_fill(~mask[:, None], -math.inf)
    return temperature * (best / temperature).logsumexp(dim=2)


def alignment(similarity: Tensor, margin: float, variant: Variant) -> Tensor:
    """Both directions of `efa_loss` for one kind of X: similarities S (B, B) -> (B,)."""
    if variant == "paper" and len(similarity) == 1:
        return 0 * similarity[0]
    if variant == "code":
        similarity = F.normalize(similarity, dim=1, eps=EPS)
    positive, itself = similarity.diagonal(), torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    by_row, by_column = (
        (similarity - anchor + margin).masked_fill(itself, 0.0 if variant == "code" else -math.inf)
        for anchor in (positive[:, None], positive[None])
    )
    return by_row.logsumexp(dim=0 if variant == "code" else 1) + by_column.logsumexp(dim=0)


@OBJECTIVES.register("efa")
class ExplicitFineGrained(Objective):
    """Explicit fine-grained alignment of FMFA, see `efa_loss`.

    The defaults are those of the first commit (yinhao1102/FMFA@8dfd532), which the published tables fit.

    Args:
        weight: weight of the loss; 0 only logs it.
        margin_text: margin where caption tokens are compared.
        margin_image: margin where patches are compared.
        temperature: temperature of the sum over tokens; smaller is nearer to the maximum.
        sigma: threshold of the aggregation in units of 1/N.
        variant: form of the loss in the authors' code or in their paper.
        mask_padding: leave out padding. The code counts it as text, so the text tower must run on all columns.
    """

    reads_tokens = True

    def __init__(
        self,
        metadata: Metadata,
        *,
        weight: Weight = 1.0,
        margin_text: Margin = 0.1,
        margin_image: Margin = 0.1,
        temperature: Annotated[float, Option(gt=0)] = 0.1,
        sigma: Annotated[float, Option(ge=0)] = 1.0,
        variant: Variant = "code",
        mask_padding: bool = False,
    ) -> None:
        super().__init__(weight=weight)
        self.options: dict[str, Any] = {
            "margin_text": margin_text,
            "margin_image": margin_image,
            "temperature": temperature,
            "sigma": sigma,
            "variant": variant,
        }
        self.mask_padding, self.full_text = mask_padding, not mask_padding

    def forward(self, step: Step) -> tuple[Tensor, Metrics]:
        patches = precise(step.image_tokens[:, 1:])
        mask = caption_mask(step.caption_ids) if self.mask_padding else None
        return efa_loss(precise(step.text_tokens), patches, text_mask=mask, **self.options), {}
