"""Which pairs make up each training batch: seeded by epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RandomBatches(Sampler[list[int]]):
    """All pairs once per epoch in random order; the last batch may be smaller.

    Args:
        num_pairs: pairs in the training set.
        batch_size: pairs in a batch.
        seed: with the epoch's number, decides the order.
    """

    def __init__(self, num_pairs: int, batch_size: int, seed: int) -> None:
        self.num_pairs, self.batch_size, self.seed = num_pairs, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_pairs // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # Not seed + epoch: the seeds of neighbouring runs must not share orders.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator)
        return iter([batch.tolist() for batch in order.split(self.batch_size)])
