"""Loaders of the rendered training pairs."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from configs.schema import DataConfig
from datasets.annotations import load_annotations
from datasets.loaders import TrainLoader, build_train_loader, data_tokenizer
from utils.batch import FIELDS, Batch, MicroBatch, to_device


def train_loader(
    root: Path, fields=tuple(FIELDS), *, workers: int = 0, seed: int = 1, full_text: bool = False, **options
):
    """Loader with three augmentations and the given fields."""
    aug = ["flip", "pad_crop", "erase"]
    config = DataConfig(root=str(root), image_size=(64, 32), image_aug=aug, batch_size=6, workers=workers, **options)
    annotations = load_annotations("synthetic", root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    return build_train_loader(
        config, annotations, tokenizer, fields=set(fields), full_text=full_text, seed=seed, pin_memory=False
    )


def noisy_loader(root: Path, dataset: str = "synthetic", fields=("index", "caption_ids", "pids", "clean"), **options):
    """Loader with the given fields, for tests of noise and caption augmentation."""
    config = DataConfig(dataset=dataset, root=str(root), image_size=(64, 32), batch_size=8, workers=0, **options)
    annotations = load_annotations(dataset, root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    return build_train_loader(
        config, annotations, tokenizer, fields=set(fields), full_text=True, seed=1, pin_memory=False
    )


def level_loader(root: Path, *, fields=("images", "caption_ids", "pids", "index"), **options):
    """Loader with two augmentations, for tests of views, text levels and identities."""
    config = DataConfig(
        root=str(root), image_size=(64, 32), image_aug=["flip", "pad_crop"], batch_size=4, workers=0, **options
    )
    annotations = load_annotations(config.dataset, root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    return build_train_loader(
        config, annotations, tokenizer, fields=set(fields), full_text=True, seed=1, pin_memory=False
    )


def fields_of(steps: Iterable[list[MicroBatch]] | Iterable[MicroBatch]) -> Iterator[Batch]:
    """Fields of every batch, on the CPU, of a loader that does not split its batches."""
    for step in steps:
        (micro_batch,) = step if isinstance(step, list) else [step]
        yield to_device(micro_batch.fields, torch.device("cpu"))


def item_of(loader: TrainLoader, index: int) -> Batch:
    """An item of the training pairs as the model sees it."""
    return to_device(loader.pairs[index], torch.device("cpu"))
