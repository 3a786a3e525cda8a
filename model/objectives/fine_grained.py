"""Explicit fine-grained alignment: each caption token gathers its patches, then tokens are matched across the batch."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.objectives.base import OBJECTIVES, Facts, Objective, Reduction, Step, Values, reduce
from utils.batch import caption_mask
from utils.errors import ConfigError
from utils.precision import precise

Variant = Literal["code", "paper"]
EPS = 1e-6  # smallest denominator: a caption token that likes all patches alike, a token that gathers nothing
BLOCK = 2**23  # similarities that `best_matches` holds at a time: 32 MB in fp32


def sparse_weights(text_tokens: Tensor, patches: Tensor, *, sigma: float = 1.0) -> Tensor:
    """How much each caption token takes of each patch of its own image (FMFA eq. 5-7; quirk Q27: nothing divides by 0).

    The inner products of a token are scaled to 0..1 over the patches, those up to sigma / N become 0, and the rest is
    divided by its sum.

    Args:
        text_tokens: (B, L, D), not normalised.
        patches: (B, N, D), not normalised, without the class token.
        sigma: threshold in units of 1/N.

    Returns:
        (B, L, N); rows sum to 1, or are 0 where a token likes all patches alike.
    """
    scores = text_tokens @ patches.transpose(1, 2)
    low, high = scores.amin(dim=2, keepdim=True), scores.amax(dim=2, keepdim=True)
    scaled = (scores - low) / (high - low).clamp(min=EPS)
    kept = torch.where(scaled > sigma / patches.shape[1], scaled, 0)
    return kept / kept.sum(dim=2, keepdim=True).clamp(min=EPS)


def sparse_aggregate(text_tokens: Tensor, patches: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Joint embeddings (B, L, D): for each caption token, its image's patches by `sparse_weights`."""
    return sparse_weights(text_tokens, patches, sigma=sigma) @ patches


def best_matches(tokens: Tensor, joint: Tensor, valid: Tensor | None = None) -> Tensor:
    """For all pairs (i, j) of the batch and each token k of i, its largest inner product with a token of j.

    The (B, B, K, L) inner products are never held whole, forwards or backwards: only the places of the largest are
    kept, and the gradient is that of their products.

    Args:
        tokens: (B, K, D).
        joint: (B, L, D).
        valid: bool (B, L), the tokens of `joint` that count (default: all); at least one in each row.

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
        return torch.cat(best, dim=1).unflatten(0, tokens.shape[:2]).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """One of L products counts, so these are sums over few rows (an L-th of the work of a matrix product)."""
        tokens, joint, rows = ctx.saved_tensors
        flat, flat_joint, weights = tokens.flatten(0, 1), joint.flatten(0, 1), grad.transpose(1, 2).flatten(0, 1)
        grad_tokens = F.embedding_bag(rows, flat_joint, mode="sum", per_sample_weights=weights)
        order = rows.flatten().argsort(stable=True)
        counts = rows.flatten().bincount(minlength=len(flat_joint))
        grad_joint = F.embedding_bag(
            order // rows.shape[1],
            flat,
            counts.cumsum(0) - counts,
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
    r"""Explicit fine-grained alignment (Yin et al., TOMM 2026, eq. 5-12; FMFA model/objectives.py).

    With $E$ the joint embeddings of `sparse_aggregate` and $X$ the caption tokens or the patches, the similarity of
    items i and j is $S_{ij} = t \log \sum_l \exp(\max_m \cos(X_i[l], E_j[m]) / t)$. Summed over both kinds of X:

    * code: rows of S are divided by their L2 norm; for each j, $\log \sum_i \exp(S_{ij} - S_{ii} + m)$ and
      $\log \sum_i \exp(S_{ij} - S_{jj} + m)$, where i = j counts as exp(0). So the first sum runs over anchors, and
      the loss stays near $2 \ln(1 + (B - 1) e^m)$ for each margin, as in the authors' logs.
    * paper: S as it is, the sums over the negatives of an anchor: $\log \sum_{j \ne i} \exp(S_{ij} - S_{ii} + m)$ and
      $\log \sum_{i \ne j} \exp(S_{ij} - S_{jj} + m)$. A batch of one pair has no negatives and costs 0.

    Args:
        text_tokens: (B, L, D), not normalised, padding included unless masked.
        patches: (B, N, D), not normalised, without the class token.
        margin_text: m where X are caption tokens.
        margin_image: m where X are patches.
        temperature: t, the paper's 1/lambda; smaller is nearer to the maximum over l.
        sigma: threshold of the aggregation in units of 1/N.
        variant: which of the two.
        text_mask: bool (B, L), the caption tokens that count, at least one in each row; None: all, as in the code.
        reduction: "mean" -> scalar, "none" -> (B,).
    """
    joint = sparse_aggregate(text_tokens, patches, sigma=sigma)
    by_text = token_similarity(text_tokens, joint, temperature, text_mask, text_mask)
    by_image = token_similarity(patches, joint, temperature, None, text_mask)
    return reduce(alignment(by_text, margin_text, variant) + alignment(by_image, margin_image, variant), reduction)


def token_similarity(
    tokens: Tensor, joint: Tensor, temperature: float, mask: Tensor | None = None, joint_mask: Tensor | None = None
) -> Tensor:
    """S of `efa_loss`, (B, B), from tokens (B, K, D) and joint embeddings (B, L, D); the masks say which count."""
    best = best_matches(F.normalize(tokens, dim=2, eps=EPS), F.normalize(joint, dim=2, eps=EPS), joint_mask)
    if mask is not None:
        best = best.masked_fill(~mask[:, None], -math.inf)
    return temperature * (best / temperature).logsumexp(dim=2)


def alignment(similarity: Tensor, margin: float, variant: Variant) -> Tensor:
    """Both directions of one half of `efa_loss`, (B,), from its similarities S (B, B)."""
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
    """See `efa_loss`; the defaults are those of FMFA's first commit (8dfd532), which its published tables fit.

    Args:
        facts: sizes.
        weight: of the loss.
        margin_text, margin_image, temperature, sigma, variant: of `efa_loss`.
        mask_padding: leave out what follows a caption's end; by default padding counts as in the code (quirk Q26),
            and therefore the text tower runs on all columns.
    """

    reads_tokens = True

    def __init__(
        self,
        facts: Facts,
        *,
        weight: float = 1.0,
        margin_text: float = 0.1,
        margin_image: float = 0.1,
        temperature: float = 0.1,
        sigma: float = 1.0,
        variant: Variant = "code",
        mask_padding: bool = False,
    ) -> None:
        super().__init__(weight=weight)
        if temperature <= 0:
            raise ConfigError(f"losses.efa.temperature: must be above 0, is {temperature}")
        if sigma < 0:
            raise ConfigError(f"losses.efa.sigma: must not be negative, is {sigma}")
        self.options: dict[str, Any] = {
            "margin_text": margin_text,
            "margin_image": margin_image,
            "temperature": temperature,
            "sigma": sigma,
            "variant": variant,
        }
        self.mask_padding, self.full_text = mask_padding, not mask_padding

    def forward(self, step: Step) -> tuple[Tensor, Values]:
        patches = precise(step.image_tokens[:, 1:])
        mask = caption_mask(step.caption_ids) if self.mask_padding else None
        return efa_loss(precise(step.text_tokens), patches, text_mask=mask, **self.options), {}
