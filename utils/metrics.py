"""Retrieval metrics (R@1/5/10, mAP, mINP) from a similarity matrix that is read a few query rows at a time.

Protocol of the IRRA evaluation (anosorae/IRRA@cfc2378:utils/metrics.py:rank): for each query the whole gallery is
ordered by decreasing similarity, and an item is relevant if its pid equals the query's. With R relevant items at ranks
r_1 < ... < r_R:

    R@k = [r_1 <= k]        AP = 1/R sum_i i / r_i        INP = R / r_R

averaged over queries. mINP is from Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook",
TPAMI 2021 (https://arxiv.org/abs/2001.04193). There are two deviations from the reference code. Ties are broken
by gallery index, because its sort is not stable. A query without a relevant item is counted and left out, where the
reference crashes. For image-to-text, swap query and gallery.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("R1", "R5", "R10", "mAP", "mINP")
CHUNK = 256  # query rows at a time: 20 MB of scores at 20,000 gallery items, about the size of a last-level cache


@dataclass(frozen=True)
class Ranking:
    """Ranks and per-query metrics of Q queries; every tensor is (Q,) and on the CPU."""

    first_rank: Tensor  # int64, 1-based rank of the first match; 0 for a query without match
    average_precision: Tensor  # float64 in [0, 1]; 0 for a query without match
    inverse_negative_penalty: Tensor  # float64 in [0, 1]; 0 for a query without match
    matches: Tensor  # int64, number of relevant gallery items

    @property
    def num_unmatched(self) -> int:
        """Number of queries whose pid is not in the gallery; no metric counts them."""
        return int((self.matches == 0).sum())

    def summary(self) -> dict[str, float]:
        """`METRICS` in percent over the queries that have a match; ValueError if none has."""
        matched = self.matches > 0
        if not matched.any():
            raise ValueError(f"query_pids: none of the {len(matched)} queries has a gallery item of its pid")
        first = self.first_rank[matched]
        values = [*((first <= k).double() for k in (1, 5, 10))]
        values += [self.average_precision[matched], self.inverse_negative_penalty[matched]]
        return {name: 100.0 * float(value.mean()) for name, value in zip(METRICS, values, strict=True)}


def retrieval_metrics(similarity: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
    """`METRICS` in percent from a similarity matrix (Q, G); errors as `rank_queries`."""
    return rank_queries(torch.split(similarity, CHUNK), query_pids, gallery_pids).summary()


@torch.no_grad()
def streamed_metrics(
    query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor, *, chunk: int = CHUNK
) -> dict[str, float]:
    """`METRICS` in percent of cosine similarities, of which `chunk` rows are held at a time.

    Args:
        query: (Q, D) of any length; unit vectors are used as they are, to the last bit.
        gallery: (G, D), likewise.
        query_pids: integers (Q,).
        gallery_pids: integers (G,).
        chunk: query rows at a time.
    """
    chunks = similarity_chunks(_unit(query), _unit(gallery), chunk=chunk)
    return rank_queries(chunks, query_pids, gallery_pids).summary()


def _unit(vectors: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Vectors (N, D) of length 1 in float32 or better. Normalising unit vectors again would change their last bits."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    lengths = vectors.norm(dim=-1)
    return vectors if ((lengths - 1).abs() <= tolerance).all() else F.normalize(vectors, dim=-1)


def similarity_chunks(query: Tensor, gallery: Tensor, *, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Rows of `query @ gallery.T`, `chunk` at a time, in float32 or better because 16 bits would make ties."""
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query and gallery: must be (Q, D) and (G, D), got {tuple(query.shape)}, {tuple(gallery.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk: must be at least 1, got {chunk}")
    dtype = torch.promote_types(torch.promote_types(query.dtype, gallery.dtype), torch.float32)
    columns = gallery.to(dtype).T
    return (rows.to(dtype) @ columns for rows in torch.split(query, chunk))


@torch.no_grad()
def rank_queries(similarity: Iterable[Tensor], query_pids: Tensor, gallery_pids: Tensor) -> Ranking:
    """Rank the gallery for each query by decreasing similarity; ties go to the lower gallery index.

    Time is O(Q G P) in vectorised steps for P relevant items per query; memory is O(q G).

    Args:
        similarity: chunks (q, G) on any device, together the Q rows in order.
        query_pids: integers (Q,).
        gallery_pids: integers (G,).

    Raises:
        ValueError: shapes do not fit, a side is empty, or a similarity is NaN.
    """
    for name, pids in (("query_pids", query_pids), ("gallery_pids", gallery_pids)):
        if pids.ndim != 1 or not len(pids) or pids.is_floating_point():
            raise ValueError(f"{name}: must be non-empty 1-D integers, got {pids.dtype} of shape {tuple(pids.shape)}")
    query_pids, gallery_pids = query_pids.cpu().long(), gallery_pids.cpu().long()
    num_queries, num_gallery = len(query_pids), len(gallery_pids)
    pids, by_pid = gallery_pids.sort()
    start = torch.searchsorted(pids, query_pids)
    matches = torch.searchsorted(pids, query_pids, right=True) - start

    columns, done = [], 0
    for scores in similarity:
        stop = done + (len(scores) if scores.ndim == 2 else 0)
        if not done < stop <= num_queries or scores.shape[1] != num_gallery:
            raise ValueError(
                f"similarity: must have {num_queries} rows (query_pids) x {num_gallery} columns (gallery_pids), "
                f"got a chunk of shape {tuple(scores.shape)} at row {done}"
            )
        if scores.max().isnan():  # max propagates NaN and needs no mask of the size of scores
            raise ValueError(
                f"similarity: must not be NaN, got NaN in rows {done} to {stop - 1}; the model has diverged"
            )
        slots = torch.arange(max(1, int(matches[done:stop].max())))
        valid = slots < matches[done:stop, None]
        items = by_pid[(start[done:stop, None] + slots).clamp(max=num_gallery - 1)]
        ranks = _ranks(scores, items.to(scores.device)).cpu()
        columns.append(_measures(ranks, matches[done:stop], valid))
        done = stop
    if done != num_queries:
        raise ValueError(f"similarity: must have one row per query_pids ({num_queries}), got {done}")
    first_rank, average_precision, inverse_negative_penalty = (torch.cat(part) for part in zip(*columns, strict=True))
    return Ranking(first_rank, average_precision, inverse_negative_penalty, matches)


def _ranks(scores: Tensor, items: Tensor) -> Tensor:
    """1-based ranks (q, P) of the gallery `items` (q, P) in `scores` (q, G)."""
    num_gallery = scores.shape[1]
    assert num_gallery < 2**24, "float32 counts exactly only up to 2**24"
    targets = scores.gather(1, items)
    above, at_least = torch.empty_like(items), torch.empty_like(items)
    # On a CPU, comparing into floats and summing those is several times faster than summing booleans.
    flags = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    for slot in range(items.shape[1]):
        target = targets[:, slot : slot + 1]
        above[:, slot] = torch.gt(scores, target, out=flags).sum(1)
        at_least[:, slot] = torch.ge(scores, target, out=flags).sum(1)
    ranks = above + 1
    tied = (at_least > ranks).any(1).nonzero().squeeze(1)
    if len(tied):  # rare among float32 scores; a stable sort puts equal ones in order of index
        order = scores[tied].argsort(dim=1, descending=True, stable=True)
        places = torch.arange(1, num_gallery + 1, device=order.device).expand_as(order)
        ranks[tied] = torch.empty_like(order).scatter_(1, order, places).gather(1, items[tied])
    return ranks


def _measures(ranks: Tensor, matches: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First rank, AP and INP, (q,) each.

    Args:
        ranks: ranks of the relevant items, padded to (q, P).
        matches: number of relevant items (q,).
        valid: bool (q, P), False for padding.
    """
    ranks = ranks.masked_fill(~valid, torch.iinfo(ranks.dtype).max).sort(dim=1).values
    precision = torch.arange(1, ranks.shape[1] + 1) / ranks.double()
    # cumsum adds from left to right, so padding, which differs by chunk, changes no bit. sum may pair terms otherwise.
    average_precision = precision.masked_fill(~valid, 0).cumsum(1)[:, -1] / matches.clamp(min=1)
    last = ranks.gather(1, (matches - 1).clamp(min=0)[:, None]).squeeze(1)
    return ranks[:, 0].masked_fill(matches == 0, 0), average_precision, matches / last.double()
