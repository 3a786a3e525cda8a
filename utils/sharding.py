"""Split a batch over processes and micro-batches, and gather the rows that its losses compare.

Each process of `torchrun` encodes its shard of every batch. Embeddings are gathered with their gradient, so that each
process computes the loss of the global batch. Losses on tokens see one micro-batch of one process and are weighted by
`micro_batch_weights`. The mean over processes of the gradients then equals the gradient of a single process.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import rank, world_size


@dataclass(frozen=True)
class Shard:
    """Number of pairs of a micro-batch on each process, and number of rows (views or texts) of a pair.

    A process without pairs encodes a dummy sample, because all processes have to run the same collectives. Its rows
    never reach a loss.
    """

    pairs: tuple[int, ...]  # one entry per process
    rows_per_pair: int = 1

    @property
    def num_pairs(self) -> int:
        """Number of pairs over all processes."""
        return sum(self.pairs)

    @property
    def num_local_rows(self) -> int:
        """Number of rows on this process, without those of a dummy sample."""
        return self.pairs[rank()] * self.rows_per_pair

    def local(self, rows: Tensor) -> Tensor:
        """The rows of this process, without those of a dummy sample."""
        return rows[: self.num_local_rows]

    def gather(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather rows over processes, in order and with their gradient; one collective per dtype.

        Args:
            rows: name -> rows of this process, (n, ...), with or without those of a dummy sample.

        Returns:
            Name -> rows of all processes, (N, ...).
        """
        local = {name: self.local(value) for name, value in rows.items()}
        if world_size() == 1:
            return local
        names_of: dict[torch.dtype, list[str]] = {}
        for name, value in local.items():
            names_of.setdefault(value.dtype, []).append(name)
        sizes = [self.rows_per_pair * pairs for pairs in self.pairs]
        gathered: dict[str, Tensor] = {}
        for names in names_of.values():
            widths = [math.prod(local[name].shape[1:]) for name in names]
            columns = [local[name].reshape(-1, width) for name, width in zip(names, widths, strict=True)]
            both = gather(torch.cat(columns, dim=1), sizes).split(widths, dim=1)
            for name, values in zip(names, both, strict=True):
                gathered[name] = values.reshape(-1, *local[name].shape[1:])
        return {name: gathered[name] for name in rows}

    def per_pair(self, rows: Tensor) -> Tensor:
        """(..., N) -> (..., pairs, rows_per_pair)."""
        grouped: Tensor = rows.unflatten(-1, (-1, self.rows_per_pair))
        return grouped

    @staticmethod
    def union(shards: Sequence["Shard"]) -> "Shard":
        """The shard of several micro-batches put one behind the other on each process."""
        pairs = (sum(counts) for counts in zip(*(shard.pairs for shard in shards), strict=True))
        return Shard(tuple(pairs), shards[0].rows_per_pair)


def split_batch(size: int, micro_batches: int = 1, rows_per_pair: int = 1) -> list[Shard]:
    """The shards of the micro-batches of a batch of `size` pairs. Each process has neighbouring pairs of the batch."""
    sizes = shard_sizes(size, micro_batches)
    return [Shard(tuple(sizes[number::micro_batches]), rows_per_pair) for number in range(micro_batches)]


def shard_sizes(size: int, micro_batches: int = 1) -> list[int]:
    """Number of items in each micro-batch of each process, the micro-batches of a process next to each other.

    The first ones have one more where `size` is not a multiple.
    """
    shards = world_size() * micro_batches
    return [size // shards + (number < size % shards) for number in range(shards)]


def local_slice(sizes: Sequence[int]) -> slice:
    """Position of this process's shard; `sizes` has one entry per process."""
    first = sum(sizes[: rank()])
    return slice(first, first + sizes[rank()])


def gather(local: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows of all processes in order, with gradient: (n, ...) -> (sum of sizes, ...).

    Args:
        local: rows of this process, sizes[rank] of them.
        sizes: number of rows of each process.
    """
    return local if world_size() == 1 else _Gather.apply(local, sizes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.sizes = sizes
        as_sent = local.byte() if local.dtype == torch.bool else local
        padded = as_sent.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = as_sent
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return torch.cat([rows[:size] for rows, size in zip(received, sizes, strict=True)]).to(local.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)  # every process's loss depends on these rows
        return gradient[local_slice(ctx.sizes)], None


def micro_batch_weights(counts: Tensor) -> Tensor:
    """Weights that turn means over the terms of micro-batches into the mean over all terms of the global batch.

    Args:
        counts: int64 (M, K), number of terms of K losses in the M micro-batches of this process.

    Returns:
        float64 (M, K). The mean over processes of the weighted sum over micro-batches is the global mean.
    """
    total = counts.sum(dim=0)
    if world_size() > 1:
        dist.all_reduce(total)
    return counts * world_size() / total.clamp(min=1).double()
