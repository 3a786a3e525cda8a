"""Config + annotations + the fields a task asks for -> data loaders."""

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler

from configs.schema import DataConfig
from datasets.annotations import Annotations, Record
from datasets.collate import Collate
from datasets.images import Images
from datasets.pairs import GalleryImages, QueryCaptions, TrainPairs
from datasets.samplers import IdentityBatches, RandomBatches, Shards
from datasets.text.levels import check_levels
from datasets.text.tokenizers import TextTokenizer, build_tokenizer
from datasets.transforms import build_transform
from utils.batch import Batch
from utils.distributed import local_processes, own_shard, shard_sizes
from utils.errors import ConfigError

OTHER_DRAWS = 2**31  # no epoch has a number as high


class TrainLoader:
    """The training batches of one epoch after another; `pairs` tells what is behind a batch's `index`."""

    def __init__(
        self,
        pairs: TrainPairs,
        batches: RandomBatches | IdentityBatches,
        batch_size: int,
        parts: int,
        load: Callable[[Sampler[list[int]]], DataLoader[Batch]],
    ) -> None:
        self.pairs, self.batches, self.batch_size, self.parts = pairs, batches, batch_size, parts
        self.load, self.loader = load, load(Shards(batches, parts))

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, or the parts of one after those of the other.

        Their order, augmentation and masking depend on the epoch and on the seed alone.

        Args:
            start: batches to leave out, which were trained on before the run was interrupted.
        """
        self.batches.set_epoch(number, start)
        self.pairs.set_epoch(number)
        return _in_parts(self.loader, self.batches, start, self.parts)

    def every_pair(self, number: int) -> Iterator[Batch]:
        """Each pair once in random batches, whatever the sampler; all draws are others than those of epoch `number`."""
        batches = RandomBatches(len(self.pairs), self.batch_size, self.pairs.seed)
        batches.set_epoch(OTHER_DRAWS + number)
        self.pairs.set_epoch(OTHER_DRAWS + number)
        return _in_parts(self.load(Shards(batches, 1)), batches, 0, 1)


def _in_parts(
    loader: DataLoader[Batch], batches: RandomBatches | IdentityBatches, start: int, parts: int
) -> Iterator[Batch]:
    """What the loader gives; where that is not a whole batch, with the sizes of what each process has."""
    loaded = iter(loader)
    for number in range(start, len(batches)):
        sizes = torch.tensor(shard_sizes(batches.size(number), parts)).view(-1, parts)
        for size in sizes.T:
            part = next(loaded)
            yield part if sizes.numel() == 1 else part | {"shards": size}


class EvalLoaders(NamedTuple):
    """One split as gallery (images) and query (captions) batches; `images` knows which could not be read."""

    gallery: DataLoader[Batch]
    query: DataLoader[Batch]
    images: Images


def build_train_loader(
    config: DataConfig,
    annotations: Annotations,
    tokenizer: TextTokenizer,
    *,
    fields: Collection[str],
    full_text: bool,
    seed: int,
    pin_memory: bool,
    parts: int = 1,
) -> TrainLoader:
    """Training batches that hold exactly `fields`.

    Args:
        fields: of utils/batch.py, what the task asks for.
        full_text: keep all `text_length` columns instead of the longest caption's.
        seed: of order, augmentation and masking.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
        parts: that each batch is loaded in.
    """
    check_levels(config.text_levels)
    if config.word_source == "attributes" and not any(record.attributes for record in annotations.train):
        raise ConfigError(
            f"data.word_source: attributes, but no annotation of {annotations.folder} has any; IVT's "
            "cuhk_pedes_att.json has, in place of reid_raw.json"
        )
    transform = build_transform(config, train=True)
    pairs = TrainPairs(annotations.train, annotations.train_labels, transform, tokenizer, fields, seed, config)
    batches = build_batches(config, [pair.record.pid for pair in pairs.pairs], seed)
    workers = num_workers(config)

    def load(batches: Sampler[list[int]]) -> DataLoader[Batch]:
        return DataLoader(
            pairs,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=Collate(fields, full_text=full_text),
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else it would draw from the model's
        )

    return TrainLoader(pairs, batches, config.batch_size, parts, load)


def build_batches(config: DataConfig, pids: list[int], seed: int) -> RandomBatches | IdentityBatches:
    """Which pairs make up each batch: the sampler that the config names."""
    if config.sampler == "identity":
        return IdentityBatches(pids, config.batch_size, config.num_instances, seed)
    return RandomBatches(len(pids), config.batch_size, seed)


def build_eval_loaders(
    config: DataConfig, records: list[Record], tokenizer: TextTokenizer, *, batch_size: int, pin_memory: bool
) -> EvalLoaders:
    """Gallery and query batches of this process's part of a split, in annotation order."""
    records = records[own_shard(shard_sizes(len(records)))]
    skip = config.on_bad_image == "skip"
    gallery = GalleryImages(records, build_transform(config, train=False), skip_bad_images=skip)
    query = QueryCaptions(records, tokenizer)
    # Without a generator of its own, a loader would draw from the model's.
    options: dict[str, Any] = {"collate_fn": Collate(), "pin_memory": pin_memory, "generator": torch.Generator()}
    return EvalLoaders(
        DataLoader(gallery, batch_size, num_workers=num_workers(config), **options),
        DataLoader(query, batch_size, **options),
        gallery.images,
    )


def data_tokenizer(config: DataConfig, folder: Path, *, most: int, kinds: Collection[str] = ("clip",)) -> TextTokenizer:
    """The tokenizer that the config names, or the one in the folder of the data set that is trained on.

    Args:
        most: tokens that the encoder knows.
        kinds: of tokenizer that it can be given.

    Raises:
        ConfigError: there is none, it is of another kind, or it has more tokens than that.
    """
    tokenizer = build_tokenizer(config.tokenizer or str(folder / "tokenizer"), config.text_length)
    if tokenizer.kind not in kinds:
        raise ConfigError(
            f"data.tokenizer: {config.tokenizer} is a {tokenizer.kind} tokenizer, "
            f"this encoder reads {' or '.join(kinds)}"
        )
    if tokenizer.vocab_size > most:
        raise ConfigError(
            f"data.tokenizer: has {tokenizer.vocab_size} tokens, but the text tower has {most} (model.text)"
        )
    return tokenizer


def num_workers(config: DataConfig) -> int:
    """Data loading processes of this one; raises `ConfigError` for more than there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.workers is None:
        return max(1, min(cores // local_processes(), 8))
    if config.workers > cores:
        raise ConfigError(
            f"data.workers: {config.workers}, but this machine has {cores} cores; use null for one a core"
        )
    return config.workers
