"""A teacher sees every training image and caption once, so that no step has to encode them again."""

import torch
from torch.utils.data import DataLoader

from configs.schema import Config
from datasets.collate import Collate, longest
from datasets.loaders import num_workers
from datasets.pairs import GalleryImages, TrainPairs
from datasets.transforms import build_transform
from model.teacher import CachedTeacher
from processor.evaluator import autocast, batches
from utils.errors import ConfigError


@torch.no_grad()
def fill_cache(teacher: CachedTeacher, pairs: TrainPairs, config: Config, device: torch.device) -> None:
    """Give the teacher its tables, of images that are not augmented.

    Raises:
        ConfigError: images may be skipped, or a pair has several views or texts.
        DataError: an image cannot be read.
    """
    if config.data.on_bad_image == "skip":
        raise ConfigError("teacher.cache: needs every training image; data.on_bad_image=error says which are missing")
    if pairs.size > 1:
        raise ConfigError(
            "teacher.cache: knows one view and one text of a pair; data.views=1 data.text_levels=[sentence]"
        )
    assert teacher.source is not None
    encoder = teacher.source.encoder.to(device)
    records = {pair.record.image_path: pair.record for pair in pairs.pairs}  # each image once
    loader = DataLoader(
        GalleryImages(list(records.values()), build_transform(config.data, train=False)),
        config.eval.batch_size,
        num_workers=num_workers(config.data),
        collate_fn=Collate(),
    )
    images, captions = [], []
    with autocast(device, config.train.precision):
        for batch in batches(loader, "images for the teacher", device):
            images.append(encoder.encode_image(batch["images"]).embedding.float())
        for start in range(0, len(pairs), config.eval.batch_size):
            texts = [pair.caption for pair in pairs.pairs[start : start + config.eval.batch_size]]
            ids = torch.stack([pairs.tokenizer.encode(text) for text in texts])
            captions.append(encoder.encode_text(ids[:, : longest(ids)].to(device)).embedding.float())
    rows = {path: row for row, path in enumerate(records)}
    places = torch.tensor([rows[pair.record.image_path] for pair in pairs.pairs], device=device)
    teacher.fill(torch.cat(images)[places], torch.cat(captions))
