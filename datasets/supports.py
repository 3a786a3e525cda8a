"""Support sets: other images and other captions of a training pair's identity (LCR2S)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from datasets.annotations import Record

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Supports:
    """Which pairs' images and captions may stand beside those of a pair (LCR2S spec 4).

    Args:
        records: the image of every training pair.
        cross_view: leave out captions of the pair's own image.
    """

    def __init__(self, records: Sequence[Record], *, cross_view: bool) -> None:
        self.records, self.cross_view = records, cross_view
        self.captions_of: dict[int, list[int]] = {}  # pid -> pairs
        images_of: dict[int, dict[int, int]] = {}  # pid -> image_id -> the first pair that has the image
        for pair, record in enumerate(records):
            self.captions_of.setdefault(record.pid, []).append(pair)
            images_of.setdefault(record.pid, {}).setdefault(record.image_id, pair)
        self.images_of = {pid: list(images.values()) for pid, images in images_of.items()}

    def images(self, pair: int, number: int, rng: np.random.Generator) -> tuple[Numbers, Mask]:
        """Pairs with other images of the identity, each image once, and which of them are real, both (number,)."""
        own = self.records[pair]
        others = [other for other in self.images_of[own.pid] if self.records[other].image_id != own.image_id]
        return draw(others, number, rng)

    def captions(self, pair: int, number: int, rng: np.random.Generator) -> tuple[Numbers, Mask]:
        """Other pairs of the identity, for their captions; as `images`."""
        own = self.records[pair]
        others = [
            other
            for other in self.captions_of[own.pid]
            if other != pair and not (self.cross_view and self.records[other].image_id == own.image_id)
        ]
        return draw(others, number, rng)


def draw(candidates: Sequence[int], number: int, rng: np.random.Generator) -> tuple[Numbers, Mask]:
    """`number` different candidates; where there are fewer, all of them, then zeros with mask False."""
    chosen = rng.choice(candidates, number, replace=False) if len(candidates) > number else np.array(candidates, int)
    found = np.zeros(number, dtype=np.int64)
    found[: len(chosen)] = chosen
    return found, np.arange(number) < len(chosen)
