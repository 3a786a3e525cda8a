"""Which pairs make up each training batch: seeded by epoch, the same whatever the number of processes."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.distributed import rank, shard_sizes
from utils.errors import ConfigError


class RandomBatches(Sampler[list[int]]):
    """All pairs once per epoch in random order; the last batch may be smaller.

    Args:
        num_pairs: pairs in the training set.
        batch_size: pairs in a batch.
        seed: with the epoch's number, decides the order.
    """

    def __init__(self, num_pairs: int, batch_size: int, seed: int) -> None:
        self.num_pairs, self.batch_size, self.seed = num_pairs, batch_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The batches of `epoch` from now on, without the first `start`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return -(-self.num_pairs // self.batch_size)

    def size(self, number: int) -> int:
        """Pairs in the batch of this number, which counts from 0."""
        return min(self.batch_size, self.num_pairs - number * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Not seed + epoch: the seeds of neighbouring runs must not share orders.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator)
        return iter([batch.tolist() for batch in order.split(self.batch_size)[self.start :]])


class IdentityBatches(Sampler[list[int]]):
    """Batches of a few identities with `num_instances` pairs each (IVT datasets/sampler.py; IVT spec 3.4).

    Every epoch, the pairs of each identity are shuffled and cut into groups of `num_instances`; what is left over is
    not seen in that epoch, and an identity with fewer pairs than that gives one group drawn with replacement. A batch
    takes one group each of identities drawn from those that still have one, until there are too few of them: all
    batches are full.

    Args:
        pids: of each pair in the training set.
        batch_size: pairs in a batch, a multiple of num_instances.
        num_instances: of one identity.
        seed: with the epoch's number, decides the batches.

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
                f"data.batch_size: {self.num_pids} identities with {num_instances} pairs each, "
                f"but there are {len(self.pairs_of)} to train on"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The batches of `epoch` from now on, without the first `start`."""
        self.batches, self.start = self._draw(np.random.default_rng([self.seed, epoch])), start

    def __len__(self) -> int:
        """The batches of this epoch, all of them."""
        return len(self.batches)

    def size(self, number: int) -> int:
        """Pairs in the batch of this number, which counts from 0."""
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


class Shards(Sampler[list[int]]):
    """This process's parts of each batch; where one is empty, the batch's first pair, as a stand-in.

    Args:
        batches: what is split.
        parts: of this process, of each batch.
    """

    def __init__(self, batches: RandomBatches | IdentityBatches, parts: int) -> None:
        self.batches, self.parts = batches, parts

    def __len__(self) -> int:
        return len(self.batches) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            sizes = shard_sizes(len(batch), self.parts)
            for shard in range(rank() * self.parts, (rank() + 1) * self.parts):
                first = sum(sizes[:shard])
                yield batch[first : first + sizes[shard]] or batch[:1]
