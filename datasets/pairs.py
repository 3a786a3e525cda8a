"""Torch data sets: training pairs, gallery images, query captions; and how their items become a batch."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.annotations import Record
from datasets.extras import augment_caption, random_mask
from datasets.levels import text_of_level
from datasets.noise import Index
from datasets.tokenizers import ClipTokenizer, TextTokenizer
from datasets.transforms import ImageTransform
from utils.batch import Batch
from utils.errors import ConfigError, DataError

TEXT_FIELDS = ("caption_ids", "mlm_ids", "mlm_labels")


class Images:
    """Reads images by number, and knows which of them could not be read, also when workers did the reading.

    Args:
        paths: one per number.
        skip_bad: `read` gives None for an image that cannot be read, instead of raising.
    """

    def __init__(self, paths: Sequence[str], *, skip_bad: bool) -> None:
        self.paths, self.skip_bad = paths, skip_bad
        self._bad = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def read(self, number: int) -> Image.Image | None:
        try:
            return read_image(self.paths[number])
        except DataError:
            if not self.skip_bad:
                raise
            self._bad[number] = True
            return None

    def unreadable(self) -> list[str]:
        """The paths that could not be read until now."""
        return sorted({self.paths[number] for number in self._bad.nonzero().flatten().tolist()})


class Pair(NamedTuple):
    """What is trained on: an image with its identity, and a caption, which noise may have taken from another one."""

    record: Record
    caption: str
    attributes: Mapping[str, str]  # those of the caption, where the data set has any


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    """Every image with each of its captions, in annotation order."""
    return [
        Pair(record, caption, attributes)
        for record in records
        for caption, attributes in zip(record.captions, record.attributes or ({},) * len(record.captions), strict=True)
    ]


class TrainPairs(Dataset[Batch]):
    """Every (image, caption) pair of the training records, in annotation order.

    What is random about a pair (augmentation, masking) is drawn from (seed, epoch, index) alone, so that it is the
    same whichever worker loads it. That also holds for the pair that takes the place of one with a skipped image.

    Args:
        records: training records.
        labels: pid -> label 0..C-1.
        transform: PIL image -> float tensor (3, H, W); may draw from torch's global generator.
        tokenizer: captions -> ids.
        fields: the batch fields to make, of utils/batch.py.
        seed: of the random draws.
        views: how often the image is in an item, each time augmented anew.
        text_levels: of datasets/levels.py, one text of the item for each; where there are fewer of these than views,
            or the other way round, the fewer ones come again.
        word_source: what the level `word` draws from.
        text_aug: part of a caption's tokens that `augment_caption` changes.
        noise: which pair's caption each pair has; None: its own.
        noise_drop: leave out the pairs whose caption is not their own.
        skip_bad_images: put another pair, drawn at random, where an image cannot be read.

    Raises (when an item is loaded):
        DataError: an image cannot be read; with `skip_bad_images`, neither can those drawn in its place.
    """

    def __init__(
        self,
        records: Sequence[Record],
        labels: dict[int, int],
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        fields: Collection[str],
        seed: int,
        *,
        views: int = 1,
        text_levels: Sequence[str] = ("sentence",),
        word_source: str = "clause",
        text_aug: float = 0.0,
        noise: Index | None = None,
        noise_drop: bool = False,
        skip_bad_images: bool = False,
    ) -> None:
        if "mlm_ids" in fields and not isinstance(tokenizer, ClipTokenizer):
            raise ConfigError("losses.mlm: masks captions of CLIP's tokenizer, data.tokenizer is of another kind")
        if text_aug and not isinstance(tokenizer, ClipTokenizer):
            raise ConfigError("data.text_aug: changes captions of CLIP's tokenizer, data.tokenizer is of another kind")
        self.views, self.text_levels, self.word_source = views, list(text_levels), word_source
        self.text_aug, self.noise = text_aug, noise
        self.pairs = pairs_of(records)
        self.clean = [True] * len(self.pairs)  # whether the caption is the pair's own
        if noise is not None:
            sources = [self.pairs[source] for source in noise]
            self.clean = [source == place for place, source in enumerate(noise)]
            self.pairs = [
                Pair(pair.record, source.caption, source.attributes)
                for pair, source in zip(self.pairs, sources, strict=True)
            ]
        if noise_drop:
            self.pairs = [pair for pair, clean in zip(self.pairs, self.clean, strict=True) if clean]
            self.clean = [True] * len(self.pairs)
        self.labels, self.transform, self.tokenizer, self.fields, self.seed = labels, transform, tokenizer, fields, seed
        self.images = Images([pair.record.image_path for pair in self.pairs], skip_bad=skip_bad_images)
        # Shared memory: workers that live on from the last epoch see the new number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Batch:
        entropy = np.random.SeedSequence([self.seed, int(self._epoch), index])
        index, image = self._read(index)
        pair = self.pairs[index]
        size = max(self.views, len(self.text_levels))
        item = {
            "index": torch.tensor([index]),
            "pids": torch.tensor([self.labels[pair.record.pid]] * size),
            "clean": torch.tensor([self.clean[index]] * size),
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))  # not the GPUs', too
            views = [self.transform(image) for _ in range(self.views)]
        rng = np.random.default_rng(entropy)
        texts = [self.tokenizer.encode(text) for text in self._texts(pair, rng)]
        mask_id = self.tokenizer.mask_id if isinstance(self.tokenizer, ClipTokenizer) else 0
        if self.text_aug:
            texts = [augment_caption(ids, mask_id, self.text_aug, rng) for ids in texts]
        item["images"], item["caption_ids"] = (_cycled(parts, size) for parts in (views, texts))
        if "mlm_ids" in self.fields:
            masked = [random_mask(ids, mask_id, rng) for ids in item["caption_ids"]]
            item["mlm_ids"], item["mlm_labels"] = (torch.stack(parts) for parts in zip(*masked, strict=True))
        return item

    def _texts(self, pair: Pair, rng: np.random.Generator) -> list[str]:
        if self.text_levels == ["sentence"]:
            return [pair.caption]
        attributes = pair.attributes if self.word_source == "attributes" else None
        return [text_of_level(pair.caption, level, rng, attributes) for level in self.text_levels]

    def _read(self, index: int) -> tuple[int, Image.Image]:
        """The image of a pair, or of one that stands in for it; and which pair that is."""
        if (image := self.images.read(index)) is not None:
            return index, image
        stand_ins = np.random.default_rng([self.seed, int(self._epoch), index, 1]).integers(len(self), size=20).tolist()
        for stand_in in stand_ins:
            if (image := self.images.read(stand_in)) is not None:
                return stand_in, image
        raise DataError(
            f"{self.images.paths[index]}: cannot be read, and neither can {len(stand_ins)} others drawn in its place"
        )


class GalleryImages(Dataset[Batch]):
    """The images of a split, in annotation order, with their raw pids; an empty item where one is skipped."""

    def __init__(self, records: Sequence[Record], transform: ImageTransform, *, skip_bad_images: bool = False) -> None:
        self.records, self.transform = records, transform
        self.images = Images([record.image_path for record in records], skip_bad=skip_bad_images)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        image = self.images.read(index)
        if image is None:
            return {}
        return {"images": self.transform(image)[None], "pids": torch.tensor([self.records[index].pid])}


class QueryCaptions(Dataset[Batch]):
    """The captions of a split, in annotation order, with their images' raw pids."""

    def __init__(self, records: Sequence[Record], tokenizer: TextTokenizer) -> None:
        self.captions = [(record.pid, caption) for record in records for caption in record.captions]
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Batch:
        pid, caption = self.captions[index]
        return {"caption_ids": self.tokenizer.encode(caption)[None], "pids": torch.tensor([pid])}


def read_image(path: str) -> Image.Image:
    """The image as RGB.

    Raises:
        DataError: it is missing, truncated or no image; the message names the path.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Exception as error:  # PIL's decoders raise errors of many types on damaged files
        raise DataError(f"{path}: this image cannot be read ({error})") from None


class Collate:
    """Items -> Batch: one after another; text cut to the longest caption unless `full_text`; only the fields asked for.

    Empty items (skipped images) are left out. Cutting changes no embedding (the text tower is causal, what follows the
    end of a caption is not looked at) and saves the tower the padding. It is done here, on the CPU, where looking at
    the ids makes no GPU wait.
    """

    def __init__(self, fields: Collection[str] | None = None, *, full_text: bool = False) -> None:
        self.fields, self.full_text = fields, full_text

    def __call__(self, items: Sequence[Batch]) -> Batch:
        items = [item for item in items if item]
        batch = {name: torch.cat([item[name] for item in items]) for name in items[0]} if items else {}
        if "caption_ids" in batch and not self.full_text:
            length = longest(batch["caption_ids"])
            batch |= {name: batch[name][:, :length].contiguous() for name in TEXT_FIELDS if name in batch}
        if "mlm_labels" in batch:
            batch["mlm_positions"] = batch["mlm_labels"].flatten().nonzero().squeeze(1)
        return batch if self.fields is None else {name: batch[name] for name in batch if name in self.fields}


def _cycled(parts: Sequence[Tensor], size: int) -> Tensor:
    """`size` of the parts, beginning again where there are fewer, stacked."""
    return torch.stack([parts[number % len(parts)] for number in range(size)])


def longest(caption_ids: Tensor) -> int:
    """The number of columns of (B, L) ids up to the last one that is not padding in every row."""
    return int(caption_ids.any(dim=0).nonzero().max()) + 1
