"""Support sets: other images and other captions of a training pair's identity (LCR2S)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from datasets.annotations import Record

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Supports:
    """Draws support sets for training pairs (docs/methods/lcr2s.md#support-sets).

    Args:
        records: record of every training pair.
        cross_view: leave out captions of the pair's own image.
    """

    def __init__(self, records: Sequence[Record], *, cross_view: bool) -> None:
        self.records, self.cross_view = records, cross_view
        self.captions_of: dict[int, list[int]] = {}  # pid -> pairs
        images_of: dict[int, dict[int, int]] = {}  # pid -> image_id -> first pair with this image
        for pair, record in enumerate(records):
            self.captions_of.setdefault(record.pid, []).append(pair)
            images_of.setdefault(record.pid, {}).setdefault(record.image_id, pair)
        self.images_of = {pid: list(images.values()) for pid, images in images_of.items()}

    def images(self, pair: int, number: int, rng: np.random.Generator) -> tuple[Numbers, Mask]:
        """Pairs with other images of the identity, each image once, and the mask of occupied slots, both (number,)."""
        record = self.records[pair]
        others = [other for other in self.images_of[record.pid] if self.records[other].image_id != record.image_id]
        return draw(others, number, rng)

    def captions(self, pair: int, number: int, rng: np.random.Generator) -> tuple[Numbers, Mask]:
        """Pairs with other captions of the identity, and the mask of occupied slots, both (number,)."""
        record = self.records[pair]
        others = [
            other
            for other in self.captions_of[record.pid]
            if other != pair and not (self.cross_view and self.records[other].image_id == record.image_id)
        ]
        return draw(others, number, rng)


def draw(candidates: Sequence[int], number: int, rng: np.random.Generator) -> tuple[Numbers, Mask]:
    """Draw `number` different candidates. If there are fewer, take all of them, then zeros with mask False."""
    chosen = rng.choice(candidates, number, replace=False) if len(candidates) > number else np.array(candidates, int)
    found = np.zeros(number, dtype=np.int64)
    found[: len(chosen)] = chosen
    return found, np.arange(number) < len(chosen)
