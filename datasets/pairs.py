"""Torch data sets: training pairs, gallery images, query captions."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from configs.schema import DataConfig
from datasets.annotations import Record
from datasets.image_cache import ImageCache
from datasets.images import Images
from datasets.noise import noise_index
from datasets.supports import Supports
from datasets.text.levels import text_of_level
from datasets.text.masking import augment_caption, random_mask
from datasets.text.tokenizers import ClipTokenizer, TextTokenizer, encode_all
from datasets.transforms import ImageTransform
from utils.batch import Batch
from utils.errors import ConfigError, DataError

SUBSTITUTES = 20  # pairs tried in place of one whose image cannot be read
# Streams of random numbers of a pair in an epoch, besides the main one.
SUBSTITUTE_STREAM, SUPPORT_IMAGE_STREAM, SUPPORT_CAPTION_STREAM = 1, 2, 3


class Pair(NamedTuple):
    """An image with its identity, and one caption. In noisy training data the caption may belong to another image."""

    record: Record
    caption: str
    attributes: Mapping[str, str]  # phrases of the caption, if the data set has them


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    """Every image with each of its captions, in annotation order."""
    return [
        Pair(record, caption, attributes)
        for record in records
        for caption, attributes in zip(record.captions, record.attributes or ({},) * len(record.captions), strict=True)
    ]


class TrainPairs(Dataset[Batch]):
    """Every (image, caption) pair of the training records, in annotation order.

    Augmentation and masking of a pair are drawn from (seed, epoch, index) alone, so they do not depend on the worker
    that loads it. A pair whose image cannot be read is replaced by another one, drawn in the same way.

    Args:
        records: training records.
        labels: raw pid -> label 0..C-1.
        transform: PIL image -> raw image; may draw from torch's global generator.
        tokenizer: captions -> ids.
        fields: batch fields to make, from utils/batch.py.
        seed: random seed.
        config: views, texts, noise, support sets and treatment of unreadable images. If there are fewer text levels
            than views, they repeat, and vice versa.
        cache: decoded images.

    Raises:
        ConfigError: on construction, fields, config and tokenizer contradict each other.
        DataError: on access, an image cannot be read, or (`on_bad_image: skip`) no substitute can be read either.
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
        cache: ImageCache | None = None,
    ) -> None:
        for key, used in (("losses.mlm", "mlm_ids" in fields), ("data.text_aug", config.text_aug > 0)):
            if used and not isinstance(tokenizer, ClipTokenizer):
                raise ConfigError(
                    f"{key}: needs a CLIP tokenizer, which has a mask token, got {tokenizer.kind}; set data.tokenizer"
                )
        self.config, self.labels, self.transform, self.tokenizer = config, labels, transform, tokenizer
        self.fields, self.seed = fields, seed
        self.rows_per_pair = max(config.views, len(config.text_levels))
        self.pairs = pairs_of(records)
        self.clean = [True] * len(self.pairs)  # False where noise replaced the caption
        self.noise = noise_index(config, len(self.pairs))  # source pair of each caption; None without noise
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
        paths = [pair.record.image_path for pair in self.pairs]
        self.images = Images(paths, skip_bad=config.on_bad_image == "skip", cache=cache)
        self.supports: Supports | None = None
        if any(name.startswith("support_") for name in fields):
            if self.rows_per_pair > 1:
                raise ConfigError(
                    f"data.views: support sets need one view and one text per pair, got {self.rows_per_pair} rows; "
                    "set data.views=1 data.text_levels=[sentence]"
                )
            self.supports = Supports(
                [pair.record for pair in self.pairs], cross_view=config.text_support == "cross_view"
            )
        # Shared memory: persistent workers see the new epoch.
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
            name: torch.tensor([value] * self.rows_per_pair)
            for name, value in (
                ("index", index),
                ("pids", self.labels[pair.record.pid]),
                ("image_ids", pair.record.image_id),
                ("clean", self.clean[index]),
            )
        }
        views = self._augmented([image] * self.config.views, entropy)
        item |= _named("images", [views[number % len(views)] for number in range(self.rows_per_pair)])
        texts = self._changed(self._texts(index, rng), rng)
        item["caption_ids"] = torch.stack([texts[number % len(texts)] for number in range(self.rows_per_pair)])
        if "mlm_ids" in self.fields:
            masked = [random_mask(ids, self._mask_id, rng) for ids in item["caption_ids"]]
            item["mlm_ids"], item["mlm_labels"] = (torch.stack(rows) for rows in zip(*masked, strict=True))
        return item if self.supports is None else item | self._support(index, self.supports)

    @cached_property
    def caption_ids(self) -> Tensor:
        """The captions of all pairs, encoded once: int32 (N, text_length)."""
        return encode_all(self.tokenizer, [pair.caption for pair in self.pairs])

    def _augmented(self, images: Sequence[Image.Image], entropy: np.random.SeedSequence) -> list[Batch]:
        with torch.random.fork_rng(devices=[]):
            # The default generator only: torch.manual_seed would seed those of the GPUs as well.
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            return [self.transform.raw(image) for image in images]

    def _changed(self, ids: Sequence[Tensor], rng: np.random.Generator) -> list[Tensor]:
        rate = self.config.text_aug
        return [augment_caption(one, self._mask_id, rate, rng) for one in ids] if rate else list(ids)

    @property
    def _mask_id(self) -> int:
        assert isinstance(self.tokenizer, ClipTokenizer)
        return self.tokenizer.mask_id

    def _texts(self, index: int, rng: np.random.Generator) -> list[Tensor]:
        """Ids of a pair's texts; those of the sentence level are known already."""
        if self.config.text_levels == ["sentence"]:
            return [self.caption_ids[index].long()]
        _, caption, phrases = self.pairs[index]
        attributes = phrases if self.config.word_source == "attributes" else None
        texts = [text_of_level(caption, level, rng, attributes) for level in self.config.text_levels]
        return [self.tokenizer.encode(text) for text in texts]

    def _support(self, index: int, supports: Supports) -> Batch:
        """Fields of the support sets: the pairs drawn, the occupied slots, augmented images and captions."""
        entropy = self._entropy(index, SUPPORT_IMAGE_STREAM)
        pairs, mask = supports.images(index, self.config.support_images, np.random.default_rng(entropy))
        item: Batch = {"support_image_pairs": torch.from_numpy(pairs)[None]}
        if "support_images" in self.fields:
            found = [self.images.read(pair) for pair in pairs[mask]]
            mask[mask] = [image is not None for image in found]
            images = [image for image in found if image is not None]
            views = self._augmented(images or [Image.new("RGB", (1, 1))], entropy)  # any image shows the fields
            item |= {name: rows[: len(images)] for name, rows in _named("support_images", views).items()}
        item["support_image_mask"] = torch.from_numpy(mask)[None]

        rng = np.random.default_rng(self._entropy(index, SUPPORT_CAPTION_STREAM))
        pairs, mask = supports.captions(index, self.config.support_captions, rng)
        item["support_caption_pairs"] = torch.from_numpy(pairs)[None]
        item["support_caption_mask"] = torch.from_numpy(mask)[None]
        if "support_caption_ids" in self.fields:
            texts = self._changed(list(self.caption_ids[pairs[mask]].long()), rng)
            empty = torch.empty(0, self.config.text_length, dtype=torch.int64)
            item["support_caption_ids"] = torch.stack(texts) if texts else empty
        return item

    def _entropy(self, index: int, *stream: int) -> np.random.SeedSequence:
        """Seed of a pair's random draws in this epoch."""
        return np.random.SeedSequence([self.seed, int(self._epoch), index, *stream])

    def _read(self, index: int) -> tuple[int, Image.Image]:
        """Read the image of a pair or of its substitute; returns that pair's index and the image."""
        if (image := self.images.read(index)) is not None:
            return index, image
        rng = np.random.default_rng(self._entropy(index, SUBSTITUTE_STREAM))
        for substitute in rng.integers(len(self), size=SUBSTITUTES).tolist():
            if (image := self.images.read(substitute)) is not None:
                return substitute, image
        raise DataError(
            f"{self.images.paths[index]}: unreadable image, and the {SUBSTITUTES} substitutes drawn are unreadable; "
            "list them with python -m tools.check_dataset"
        )


class GalleryImages(Dataset[Batch]):
    """The images of a split, in annotation order; an empty item for a skipped one."""

    def __init__(
        self,
        records: Sequence[Record],
        transform: ImageTransform,
        *,
        skip_bad_images: bool = False,
        cache: ImageCache | None = None,
    ) -> None:
        self.transform = transform
        self.images = Images([record.image_path for record in records], skip_bad=skip_bad_images, cache=cache)

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitem__(self, index: int) -> Batch:
        image = self.images.read(index)
        return {} if image is None else _named("images", [self.transform.raw(image)])


class QueryCaptions(Dataset[Batch]):
    """The captions of a split, from short to long, so that a batch has little padding."""

    def __init__(self, records: Sequence[Record], tokenizer: TextTokenizer) -> None:
        caption_ids = encode_all(tokenizer, [pair.caption for pair in pairs_of(records)])
        order = (caption_ids != 0).sum(1).argsort(stable=True)
        self.caption_ids = caption_ids[order]
        self.places = order.argsort()  # place of each caption here, in annotation order

    def __len__(self) -> int:
        return len(self.caption_ids)

    def __getitem__(self, index: int) -> Batch:
        return {"caption_ids": self.caption_ids[index].long()[None]}


def _named(name: str, images: Sequence[Batch]) -> Batch:
    """Fields of raw images, joined under a name."""
    if len(images) == 1:  # without a copy
        return {name + rest: value for rest, value in images[0].items()}
    return {name + rest: torch.cat([image[rest] for image in images]) for rest in images[0]}
