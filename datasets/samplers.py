"""Composition of the training batches: seeded by epoch, independent of the number of processes."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.distributed import rank
from utils.errors import ConfigError
from utils.sharding import shard_sizes


class RandomBatches(Sampler[list[int]]):
    """All pairs once per epoch in random order; the last batch may be smaller.

    Args:
        num_pairs: pairs in the training set.
        batch_size: pairs in a batch.
        seed: random seed; with the epoch, it decides the order.
    """

    def __init__(self, num_pairs: int, batch_size: int, seed: int) -> None:
        self.num_pairs, self.batch_size, self.seed = num_pairs, batch_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the batches of `epoch`, without the first `start`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return -(-self.num_pairs // self.batch_size)

    def size(self, number: int) -> int:
        """Number of pairs in a batch; batches count from 0."""
        return min(self.batch_size, self.num_pairs - number * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Not seed + epoch: runs with neighbouring seeds must not share orders.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator)
        return iter([batch.tolist() for batch in order.split(self.batch_size)[self.start :]])


class IdentityBatches(Sampler[list[int]]):
    """Batches of a few identities with `num_instances` pairs each (docs/methods/ivt.md#identity-batches).

    Every epoch, the pairs of each identity are shuffled and cut into groups of `num_instances`. Incomplete groups are
    dropped, except that an identity with fewer pairs gives one group drawn with replacement. A batch takes one group
    each of random identities that still have one, until too few of them are left. All batches are full.

    Args:
        pids: identity of each pair in the training set.
        batch_size: pairs in a batch, a multiple of num_instances.
        num_instances: pairs of an identity in a batch.
        seed: random seed; with the epoch, it decides the batches.

    Raises:
        ConfigError: a batch needs more identities than there are.
    """

    def __init__(self, pids: Sequence[int], batch_size: int, num_instances: int, seed: int) -> None:
        self.pairs_of: dict[int, list[int]] = {}
        for pair, pid in enumerate(pids):
            self.pairs_of.setdefault(pid, []).append(pair)
        self.num_pids, self.num_instances, self.seed = batch_size // num_instances, num_instances, seed
        if self.num_pids > len(self.pairs_of):
            raise ConfigError(
                f"data.batch_size: a batch of {batch_size} needs {self.num_pids} identities with {num_instances} pairs "
                f"each, got {len(self.pairs_of)} training identities; lower data.batch_size or raise data.num_instances"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw the batches of `epoch`, without the first `start`."""
        self.batches, self.start = self._draw(np.random.default_rng([self.seed, epoch])), start

    def __len__(self) -> int:
        """Number of batches in the epoch, including those left out at its start."""
        return len(self.batches)

    def size(self, number: int) -> int:
        """Number of pairs in a batch; batches count from 0."""
        return len(self.batches[number])

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches[self.start :])

    def _draw(self, rng: np.random.Generator) -> list[list[int]]:
        groups = {pid: self._groups(pairs, rng) for pid, pairs in self.pairs_of.items()}
        left, batches = list(groups), []
        while len(left) >= self.num_pids:
            chosen = [left[place] for place in rng.choice(len(left), self.num_pids, replace=False)]
            batches.append([pair for pid in chosen for pair in groups[pid].pop()])
            left = [pid for pid in left if groups[pid]]
        return batches

    def _groups(self, pairs: list[int], rng: np.random.Generator) -> list[list[int]]:
        size = self.num_instances
        order = rng.permutation(pairs) if len(pairs) >= size else rng.choice(pairs, size)
        return order[: len(order) // size * size].reshape(-1, size).tolist()


class LocalMicroBatches(Sampler[list[int]]):
    """The micro-batches that this process encodes, batch by batch.

    An empty one is replaced by the batch's first pair, as a dummy sample.

    Args:
        batches: sampler of the global batches.
        micro_batches: number of micro-batches per process and batch.
    """

    def __init__(self, batches: RandomBatches | IdentityBatches, micro_batches: int) -> None:
        self.batches, self.micro_batches = batches, micro_batches

    def __len__(self) -> int:
        return len(self.batches) * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            sizes = shard_sizes(len(batch), self.micro_batches)
            for number in range(rank() * self.micro_batches, (rank() + 1) * self.micro_batches):
                first = sum(sizes[:number])
                yield batch[first : first + sizes[number]] or batch[:1]
