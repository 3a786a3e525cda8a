"""Retrieval metrics (R@1/5/10, mAP, mINP) from a similarity that is read a few query rows at a time.

Protocol of the IRRA evaluation (Jiang & Ye, CVPR 2023): for each query the whole gallery is ordered by decreasing
similarity and an item is relevant if its pid equals the query's. With R relevant items at ranks r_1 < ... < r_R:

    R@k = [r_1 <= k]        AP = 1/R sum_i i / r_i        INP = R / r_R

averaged over queries. mINP is from Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook",
TPAMI 2021. Two deviations from the reference code: ties are broken by gallery index (its sort is not stable), and
a query without a relevant item is counted and left out (it crashes there). For image-to-text, swap query and gallery.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256  # query rows at a time: 20 MB of scores at 20,000 gallery items, about what a CPU's last-level cache holds


@dataclass(frozen=True)
class Ranking:
    """What one ranking of the gallery says about each of Q queries; every tensor is (Q,) and on the CPU."""

    first_rank: Tensor  # int64, 1-based rank of the first match; 0 where the query has no match
    average_precision: Tensor  # float64 in [0, 1]; 0 where the query has no match
    inverse_negative_penalty: Tensor  # float64 in [0, 1]; 0 where the query has no match
    matches: Tensor  # int64, relevant gallery items

    @property
    def num_unmatched(self) -> int:
        """Queries whose pid is nowhere in the gallery; they are in no mean."""
        return int((self.matches == 0).sum())

    def summary(self) -> dict[str, float]:
        """R1, R5, R10, mAP and mINP in percent, over the queries that have a match; ValueError if none has."""
        matched = self.matches > 0
        if not matched.any():
            raise ValueError(f"none of the {len(matched)} queries has a gallery item of its pid: nothing to measure")
        first = self.first_rank[matched]
        values = {f"R{k}": (first <= k).double() for k in (1, 5, 10)}
        values["mAP"] = self.average_precision[matched]
        values["mINP"] = self.inverse_negative_penalty[matched]
        return {name: 100.0 * float(value.mean()) for name, value in values.items()}


def retrieval_metrics(similarity: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
    """R1, R5, R10, mAP and mINP in percent from a (Q, G) similarity; errors as `rank_queries`."""
    return rank_queries(torch.split(similarity, CHUNK), query_pids, gallery_pids).summary()


def streamed_metrics(
    query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor, *, chunk: int = CHUNK
) -> dict[str, float]:
    """`retrieval_metrics` of `query @ gallery.T`, never holding more than `chunk` of its rows.

    query (Q, D), gallery (G, D): used as they are, so normalise them first if cosine similarity is meant.
    """
    return rank_queries(similarity_chunks(query, gallery, chunk=chunk), query_pids, gallery_pids).summary()


def similarity_chunks(query: Tensor, gallery: Tensor, *, chunk: int = CHUNK) -> Iterator[Tensor]:
    """The rows of `query @ gallery.T` in order, `chunk` at a time, in float32 or better (16 bits would make ties)."""
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} and gallery {tuple(gallery.shape)} must be (Q, D) and (G, D)")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    dtype = torch.promote_types(torch.promote_types(query.dtype, gallery.dtype), torch.float32)
    columns = gallery.to(dtype).T
    return (rows.to(dtype) @ columns for rows in torch.split(query, chunk))


@torch.no_grad()
def rank_queries(similarity: Iterable[Tensor], query_pids: Tensor, gallery_pids: Tensor) -> Ranking:
    """Rank the gallery for each query, higher similarity first, lower gallery index first among equals.

    similarity: (q, G) pieces on any device, which together are the Q rows in order. query_pids (Q,), gallery_pids (G,):
    any integers. Time is O(Q G P) in cheap vectorised steps, for P relevant items a query; memory is O(q G).
    Raises ValueError on shapes that do not fit, an empty side, or NaN (which has no rank: the model has diverged).
    """
    for name, pids in (("query_pids", query_pids), ("gallery_pids", gallery_pids)):
        if pids.ndim != 1 or not len(pids) or pids.is_floating_point():
            raise ValueError(f"{name} must be non-empty 1-D integers, not {pids.dtype} of shape {tuple(pids.shape)}")
    query_pids, gallery_pids = query_pids.cpu().long(), gallery_pids.cpu().long()
    num_queries, num_gallery = len(query_pids), len(gallery_pids)
    pids, by_pid = gallery_pids.sort()
    start = torch.searchsorted(pids, query_pids)
    matches = torch.searchsorted(pids, query_pids, right=True) - start

    parts, done = [], 0
    for scores in similarity:
        stop = done + (len(scores) if scores.ndim == 2 else 0)
        if not done < stop <= num_queries or scores.shape[1] != num_gallery:
            raise ValueError(
                f"similarity rows of shape {tuple(scores.shape)} from query {done} on do not fit "
                f"{num_queries} query_pids x {num_gallery} gallery_pids"
            )
        if scores.max().isnan():  # max propagates NaN, and needs no mask of the size of scores
            raise ValueError(f"similarity holds NaN (queries {done} to {stop - 1}): the model has diverged")
        slots = torch.arange(max(1, int(matches[done:stop].max())))
        valid = slots < matches[done:stop, None]
        items = by_pid[(start[done:stop, None] + slots).clamp(max=num_gallery - 1)]
        ranks = _ranks(scores, items.to(scores.device)).cpu()
        parts.append(_measures(ranks, matches[done:stop], valid))
        done = stop
    if done != num_queries:
        raise ValueError(f"similarity has {done} rows, but there are {num_queries} query_pids")
    first_rank, average_precision, inverse_negative_penalty = (torch.cat(part) for part in zip(*parts, strict=True))
    return Ranking(first_rank, average_precision, inverse_negative_penalty, matches)


def _ranks(scores: Tensor, items: Tensor) -> Tensor:
    """1-based ranks (q, P) of the gallery `items` (q, P) in `scores` (q, G)."""
    num_gallery = scores.shape[1]
    assert num_gallery < 2**24, "float32 counts exactly only up to 2**24"
    targets = scores.gather(1, items)
    above, at_least = torch.empty_like(items), torch.empty_like(items)
    # Comparing into floats and summing those is several times faster on a CPU than summing booleans.
    flags = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    for slot in range(items.shape[1]):
        target = targets[:, slot : slot + 1]
        above[:, slot] = torch.gt(scores, target, out=flags).sum(1)
        at_least[:, slot] = torch.ge(scores, target, out=flags).sum(1)
    ranks = above + 1
    tied = (at_least > ranks).any(1).nonzero().squeeze(1)
    if len(tied):  # rare among float32 scores: only these rows are sorted, which puts equals in order of index
        order = scores[tied].argsort(dim=1, descending=True, stable=True)
        places = torch.arange(1, num_gallery + 1, device=order.device).expand_as(order)
        ranks[tied] = torch.empty_like(order).scatter_(1, order, places).gather(1, items[tied])
    return ranks


def _measures(ranks: Tensor, matches: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First rank, AP and INP (q,) from the ranks (q, P) of the relevant items, of which `matches` (q,) are `valid`."""
    ranks = ranks.masked_fill(~valid, torch.iinfo(ranks.dtype).max).sort(dim=1).values
    precision = torch.arange(1, ranks.shape[1] + 1) / ranks.double()
    # cumsum adds from left to right, so that padding, which differs by chunk, does not change the last bit as sum may.
    average_precision = precision.masked_fill(~valid, 0).cumsum(1)[:, -1] / matches.clamp(min=1)
    last = ranks.gather(1, (matches - 1).clamp(min=0)[:, None]).squeeze(1)
    return ranks[:, 0].masked_fill(matches == 0, 0), average_precision, matches / last.double()
