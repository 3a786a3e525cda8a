"""Torch data sets: training pairs, gallery images, query captions."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from configs.schema import DataConfig
from datasets.annotations import Record
from datasets.images import Images
from datasets.noise import noise_index
from datasets.supports import Supports
from datasets.text.levels import text_of_level
from datasets.text.masking import augment_caption, random_mask
from datasets.text.tokenizers import ClipTokenizer, TextTokenizer
from datasets.transforms import ImageTransform
from utils.batch import Batch
from utils.errors import ConfigError, DataError


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
        config: its views, texts, noise, support sets, and what to do about images that cannot be read. Where there are
            fewer text levels than views, or the other way round, the fewer ones come again.

    Raises:
        ConfigError: fields, config and tokenizer do not go together; when it is made.
        DataError: an image cannot be read (with `on_bad_image: skip`, neither can those drawn in its place); when an
            item is loaded.
    """

    def __init__(
        self,
        records: Sequence[Record],
        labels: dict[int, int],
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        fields: Collection[str],
        seed: int,
        config: DataConfig,
    ) -> None:
        if "mlm_ids" in fields and not isinstance(tokenizer, ClipTokenizer):
            raise ConfigError("losses.mlm: masks captions of CLIP's tokenizer, data.tokenizer is of another kind")
        if config.text_aug and not isinstance(tokenizer, ClipTokenizer):
            raise ConfigError("data.text_aug: changes captions of CLIP's tokenizer, data.tokenizer is of another kind")
        self.config, self.labels, self.transform, self.tokenizer = config, labels, transform, tokenizer
        self.fields, self.seed = fields, seed
        self.size = max(config.views, len(config.text_levels))  # rows of an item
        self.pairs = pairs_of(records)
        self.clean = [True] * len(self.pairs)  # whether the caption is the pair's own
        self.noise = noise_index(config, len(self.pairs))  # which pair's caption each has; None: its own
        if self.noise is not None:
            sources = [self.pairs[source] for source in self.noise]
            self.clean = [source == place for place, source in enumerate(self.noise)]
            self.pairs = [
                Pair(pair.record, source.caption, source.attributes)
                for pair, source in zip(self.pairs, sources, strict=True)
            ]
        if config.noise_drop:
            self.pairs = [pair for pair, clean in zip(self.pairs, self.clean, strict=True) if clean]
            self.clean = [True] * len(self.pairs)
        self.images = Images([pair.record.image_path for pair in self.pairs], skip_bad=config.on_bad_image == "skip")
        self.supports: Supports | None = None
        if any(name.startswith("support_") for name in fields):
            if self.size > 1:
                raise ConfigError("data.views, data.text_levels: support sets are for one view and one text of a pair")
            self.supports = Supports(
                [pair.record for pair in self.pairs], cross_view=config.text_support == "cross_view"
            )
        # Shared memory: workers that live on from the last epoch see the new number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Batch:
        entropy = self._entropy(index)
        index, image = self._read(index)
        pair, rng = self.pairs[index], np.random.default_rng(entropy)
        item = {
            "index": torch.tensor([index]),
            "pids": torch.tensor([self.labels[pair.record.pid]] * self.size),
            "image_ids": torch.tensor([pair.record.image_id] * self.size),
            "clean": torch.tensor([self.clean[index]] * self.size),
        }
        views = self._augmented([image] * self.config.views, entropy)
        texts = self._encoded(self._texts(pair, rng), rng)
        item["images"], item["caption_ids"] = (_cycled(parts, self.size) for parts in (views, texts))
        if "mlm_ids" in self.fields:
            masked = [random_mask(ids, self._mask_id, rng) for ids in item["caption_ids"]]
            item["mlm_ids"], item["mlm_labels"] = (torch.stack(parts) for parts in zip(*masked, strict=True))
        return item if self.supports is None else item | self._support(index, self.supports)

    def _augmented(self, images: Sequence[Image.Image], entropy: np.random.SeedSequence) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))  # not the GPUs', too
            return [self.transform(image) for image in images]

    def _encoded(self, texts: Sequence[str], rng: np.random.Generator) -> list[Tensor]:
        ids = [self.tokenizer.encode(text) for text in texts]
        rate = self.config.text_aug
        return [augment_caption(one, self._mask_id, rate, rng) for one in ids] if rate else ids

    @property
    def _mask_id(self) -> int:
        assert isinstance(self.tokenizer, ClipTokenizer)
        return self.tokenizer.mask_id

    def _texts(self, pair: Pair, rng: np.random.Generator) -> list[str]:
        if self.config.text_levels == ["sentence"]:
            return [pair.caption]
        attributes = pair.attributes if self.config.word_source == "attributes" else None
        return [text_of_level(pair.caption, level, rng, attributes) for level in self.config.text_levels]

    def _support(self, index: int, supports: Supports) -> Batch:
        """Other images and captions of the identity: which pairs have them, and those that are real, each augmented."""
        entropy = self._entropy(index, 2)
        pairs, mask = supports.images(index, self.config.support_images, np.random.default_rng(entropy))
        item: Batch = {"support_image_pairs": torch.from_numpy(pairs)[None]}
        if "support_images" in self.fields:
            found = [self.images.read(pair) for pair in pairs[mask]]
            mask[mask] = [image is not None for image in found]
            views = self._augmented([image for image in found if image is not None], entropy)
            item["support_images"] = torch.stack(views) if views else torch.empty(0, 3, *self.config.image_size)
        item["support_image_mask"] = torch.from_numpy(mask)[None]

        rng = np.random.default_rng(self._entropy(index, 3))
        pairs, mask = supports.captions(index, self.config.support_captions, rng)
        item["support_caption_pairs"] = torch.from_numpy(pairs)[None]
        item["support_caption_mask"] = torch.from_numpy(mask)[None]
        if "support_caption_ids" in self.fields:
            texts = self._encoded([self.pairs[pair].caption for pair in pairs[mask]], rng)
            empty = torch.empty(0, self.config.text_length, dtype=torch.int64)
            item["support_caption_ids"] = torch.stack(texts) if texts else empty
        return item

    def _entropy(self, index: int, *stream: int) -> np.random.SeedSequence:
        """What is random about a pair in this epoch; the pair itself has no stream, its stand-in has 1."""
        return np.random.SeedSequence([self.seed, int(self._epoch), index, *stream])

    def _read(self, index: int) -> tuple[int, Image.Image]:
        """The image of a pair, or of one that stands in for it; and which pair that is."""
        if (image := self.images.read(index)) is not None:
            return index, image
        stand_ins = np.random.default_rng(self._entropy(index, 1)).integers(len(self), size=20).tolist()
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


def _cycled(parts: Sequence[Tensor], size: int) -> Tensor:
    """`size` of the parts, beginning again where there are fewer, stacked."""
    return torch.stack([parts[number % len(parts)] for number in range(size)])
