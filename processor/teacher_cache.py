"""A teacher sees every training image and caption once, so that no step has to encode them again."""

import torch
from torch.utils.data import DataLoader

from configs.schema import Config
from datasets.collate import Collate, longest
from datasets.loaders import num_workers
from datasets.pairs import GalleryImages, TrainPairs
from datasets.transforms import build_transform
from model.teacher import CachedTeacher
from processor.evaluator import batches
from utils.distributed import gather, own_shard, shard_sizes
from utils.errors import ConfigError
from utils.precision import autocast


@torch.no_grad()
def fill_cache(teacher: CachedTeacher, pairs: TrainPairs, config: Config, device: torch.device) -> None:
    """Give the teacher its tables, of images that are not augmented; each process encodes its part of them.

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
    records = list({pair.record.image_path: pair.record for pair in pairs.pairs}.values())  # each image once
    images, captions = shard_sizes(len(records)), shard_sizes(len(pairs))
    loader = DataLoader(
        GalleryImages(records[own_shard(images)], build_transform(config.data, train=False)),
        config.eval.batch_size,
        num_workers=num_workers(config.data),
        collate_fn=Collate(),
    )
    texts = [pair.caption for pair in pairs.pairs[own_shard(captions)]]
    image_parts, caption_parts = [], []
    with autocast(device, config.train.precision):
        for batch in batches(loader, "images for the teacher", device):
            image_parts.append(encoder.encode_image(batch["images"]).embedding.float())
        for start in range(0, len(texts), config.eval.batch_size):
            ids = torch.stack([pairs.tokenizer.encode(text) for text in texts[start : start + config.eval.batch_size]])
            caption_parts.append(encoder.encode_text(ids[:, : longest(ids)].to(device)).embedding.float())
    rows = {record.image_path: row for row, record in enumerate(records)}
    places = torch.tensor([rows[pair.record.image_path] for pair in pairs.pairs], device=device)
    teacher.fill(gather(torch.cat(image_parts), images)[places], gather(torch.cat(caption_parts), captions))
