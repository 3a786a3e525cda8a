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
CHUNK, SMALLEST_CHUNK = 256, 64  # query rows at a time; the matrix product is slow with fewer
CHUNK_BYTES = 2**26  # of scores; larger chunks have fewer rows, down to the smallest
BLOCK_BYTES = 2**22  # of scores that are compared with all thresholds while they are in a CPU's cache
TILE = 128  # gallery items in a row
SLOTS = 32  # relevant items of a query at a time


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
    query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor, *, chunk: int | None = None
) -> dict[str, float]:
    """`METRICS` in percent of cosine similarities, of which `chunk` rows are held at a time.

    Args:
        query: (Q, D) of any length; unit vectors are used as they are, to the last bit.
        gallery: (G, D), likewise.
        query_pids: integers (Q,).
        gallery_pids: integers (G,).
        chunk: query rows at a time; None for 256, or fewer if the gallery is large.
    """
    chunks = similarity_chunks(_unit(query), _unit(gallery), chunk=chunk)
    return rank_queries(chunks, query_pids, gallery_pids).summary()


def _unit(vectors: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Vectors (N, D) of length 1 in float32 or better. Normalising unit vectors again would change their last bits."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    lengths = vectors.norm(dim=-1)
    return vectors if ((lengths - 1).abs() <= tolerance).all() else F.normalize(vectors, dim=-1)


def similarity_chunks(query: Tensor, gallery: Tensor, *, chunk: int | None = None) -> Iterator[Tensor]:
    """Rows of `query @ gallery.T`, `chunk` at a time, in float32 or better because 16 bits would make ties."""
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query and gallery: must be (Q, D) and (G, D), got {tuple(query.shape)}, {tuple(gallery.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(query.dtype, gallery.dtype), torch.float32)
    if chunk is None:
        fitting = CHUNK_BYTES // (max(1, len(gallery)) * dtype.itemsize)
        chunk = min(CHUNK, max(SMALLEST_CHUNK, fitting))
    if chunk < 1:
        raise ValueError(f"chunk: must be at least 1, got {chunk}")
    columns = gallery.to(dtype).T
    return (rows.to(dtype) @ columns for rows in torch.split(query, chunk))


@torch.no_grad()
def rank_queries(similarity: Iterable[Tensor], query_pids: Tensor, gallery_pids: Tensor) -> Ranking:
    """Rank the gallery for each query by decreasing similarity; ties go to the lower gallery index.

    Time is O(Q G P) in vectorised steps for P relevant items per query; memory is O(q G). On a GPU, nothing waits for
    the device before the last chunk.

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
    most = matches.clamp(min=1)  # on the CPU, where the largest number causes no device sync

    largest, stops = [], [0]
    for scores in similarity:
        done = stops[-1]
        stop = done + (len(scores) if scores.ndim == 2 else 0)
        if not done < stop <= num_queries or scores.shape[1] != num_gallery:
            raise ValueError(
                f"similarity: must have {num_queries} rows (query_pids) x {num_gallery} columns (gallery_pids), "
                f"got a chunk of shape {tuple(scores.shape)} at row {done}"
            )
        if done == 0:
            start, matches, by_pid = (part.to(scores.device) for part in (start, matches, by_pid))
            # Made once: small tensors that stay keep the allocator from using the space of large ones again.
            measures = torch.empty(3, num_queries, dtype=torch.float64, device=scores.device)
        largest.append(scores.max())  # max propagates NaN and needs no mask of the size of scores
        for block in scores.split(_block(scores)):
            rows = slice(done, done + len(block))
            slots = torch.arange(int(most[rows].max()), device=scores.device)
            items = by_pid[(start[rows, None] + slots).clamp(max=num_gallery - 1)]
            ranks = torch.cat([_ranks(block, some) for some in items.split(SLOTS, dim=1)], dim=1)
            measures[:, rows] = _measures(ranks, matches[rows], slots < matches[rows, None])
            done = rows.stop
        stops.append(stop)
    if stops[-1] != num_queries:
        raise ValueError(f"similarity: must have one row per query_pids ({num_queries}), got {stops[-1]}")
    for number in torch.stack(largest).isnan().nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"similarity: must not be NaN, got NaN in rows {stops[number]} to {stops[number + 1] - 1}; "
            "the model has diverged"
        )
    first_rank, average_precision, inverse_negative_penalty = measures.cpu()
    return Ranking(first_rank.long(), average_precision, inverse_negative_penalty, matches.cpu())


def _block(scores: Tensor) -> int:
    """Rows of scores (q, G) to count at a time. A GPU takes all of them, because it waits for many small steps."""
    fitting = max(1, BLOCK_BYTES // (scores.shape[1] * scores.itemsize))
    return fitting if scores.device.type == "cpu" else len(scores)


def _ranks(scores: Tensor, items: Tensor) -> Tensor:
    """1-based ranks (q, P) of the gallery `items` (q, P) in `scores` (q, G).

    An item j is behind an item i with score t if s_j <= t and j > i, or if s_j < t. For s_j < t the comparison is
    s_j <= t', where t' is the next smaller number. So one comparison per score serves all tiles of the gallery except
    the item's, in which the ties up to the item are counted and taken off.
    """
    num_rows, num_gallery = scores.shape
    assert num_gallery < 2**24, "float32 counts exactly only up to 2**24"
    width = min(TILE, num_gallery)
    tile, num_tiles = items // width, num_gallery // width
    tiles, rest = scores[:, : num_tiles * width].unflatten(1, (num_tiles, width)), scores[:, num_tiles * width :]
    targets = scores.gather(1, items)
    smaller = targets.nextafter(torch.full_like(targets, -torch.inf))
    smaller = smaller.masked_fill(targets == -torch.inf, torch.nan)  # nothing is <= NaN
    earlier = torch.arange(num_tiles + 1, device=items.device) < tile[:, :, None]
    bounds = torch.where(earlier, smaller[:, :, None], targets[:, :, None])

    behind = (rest[:, None] <= bounds[:, :, num_tiles:]).sum(2)
    # On a CPU, comparing into floats and summing those is several times faster than summing booleans.
    flags = torch.empty(tiles.shape, dtype=scores.dtype, device=scores.device)
    for slot in range(items.shape[1]):
        torch.le(tiles, bounds[:, slot, :num_tiles, None], out=flags)
        behind[:, slot] += flags.view(num_rows, -1).sum(1).long()

    start = (tile * width).clamp(max=num_gallery - width)  # of a window that holds the item's tile
    window = scores.unfold(1, width, 1)[torch.arange(num_rows, device=items.device)[:, None], start]
    places = torch.arange(width, dtype=torch.int32, device=items.device)
    first, last = ((place - start).int()[:, :, None] for place in (tile * width, items))
    tied = (window == targets[:, :, None]) & (places >= first) & (places <= last)  # the item itself included
    return num_gallery - behind + tied.sum(2)


def _measures(ranks: Tensor, matches: Tensor, valid: Tensor) -> Tensor:
    """First rank, AP and INP, float64 (3, q).

    Args:
        ranks: ranks of the relevant items, padded to (q, P).
        matches: number of relevant items (q,).
        valid: bool (q, P), False for padding.
    """
    ranks = ranks.masked_fill(~valid, torch.iinfo(ranks.dtype).max).sort(dim=1).values
    precision = torch.arange(1, ranks.shape[1] + 1, device=ranks.device) / ranks.double()
    # cumsum adds from left to right, so padding, which differs by chunk, changes no bit. sum may pair terms otherwise.
    average_precision = precision.masked_fill(~valid, 0).cumsum(1)[:, -1] / matches.clamp(min=1)
    last = ranks.gather(1, (matches - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.stack([ranks[:, 0].masked_fill(matches == 0, 0), average_precision, matches / last.double()])


def best_items(scores: Tensor, number: int) -> list[Tensor]:
    """Columns of the `number` largest of each row of scores (q, G), in order; ties go to the lower index."""
    number = min(number, scores.shape[1])
    least = scores.topk(number, dim=1).values[:, -1:]
    found = [row.nonzero().squeeze(1) for row in scores >= least]  # more than `number` if the last one is tied
    orders = (row[items].argsort(descending=True, stable=True) for row, items in zip(scores, found, strict=True))
    return [items[order[:number]] for items, order in zip(found, orders, strict=True)]
