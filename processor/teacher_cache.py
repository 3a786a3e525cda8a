"""Encoding of all training images and captions by a frozen teacher, once before training."""

import torch

from configs.schema import Config
from datasets.collate import longest
from datasets.loaders import gallery_loader
from datasets.pairs import GalleryImages, TrainPairs
from datasets.transforms import build_transform
from model.teacher import CachedTeacher
from processor.evaluator import batches
from utils.batch import send
from utils.errors import ConfigError
from utils.precision import autocast
from utils.sharding import gather, local_slice, shard_sizes


@torch.no_grad()
def fill_cache(teacher: CachedTeacher, pairs: TrainPairs, config: Config, device: torch.device) -> None:
    """Fill the teacher's tables, from images without augmentation; each process encodes its shard.

    Raises:
        ConfigError: images may be skipped, or a pair has several views or texts.
        DataError: an image cannot be read.
    """
    if config.data.on_bad_image == "skip":
        raise ConfigError(
            "teacher.cache: needs every training image; set data.on_bad_image=error or teacher.cache=false"
        )
    if pairs.rows_per_pair > 1:
        raise ConfigError(
            f"teacher.cache: needs one view and one text per pair, got {pairs.rows_per_pair} rows; "
            "set data.views=1 data.text_levels=[sentence], or teacher.cache=false"
        )
    assert teacher.source is not None
    encoder = teacher.source.encoder.to(device)
    records = list({pair.record.image_path: pair.record for pair in pairs.pairs}.values())  # each image once
    images, captions = shard_sizes(len(records)), shard_sizes(len(pairs))
    local = GalleryImages(records[local_slice(images)], build_transform(config.data, train=False))
    loader = gallery_loader(config.data, local, config.eval.batch_size, pin_memory=device.type != "cpu")
    texts = [pair.caption for pair in pairs.pairs[local_slice(captions)]]
    image_rows, caption_rows = [], []
    with autocast(device, config.train.precision):
        for batch in batches(loader, "images for the teacher", device):
            image_rows.append(encoder.encode_image(batch["images"]).embedding.float())
        for start in range(0, len(texts), config.eval.batch_size):
            ids = torch.stack([pairs.tokenizer.encode(text) for text in texts[start : start + config.eval.batch_size]])
            caption_rows.append(encoder.encode_text(send(ids[:, : longest(ids)], device)).embedding.float())
    row_of = {record.image_path: row for row, record in enumerate(records)}
    image_of_pair = torch.tensor([row_of[pair.record.image_path] for pair in pairs.pairs], device=device)
    teacher.fill(gather(torch.cat(image_rows), images)[image_of_pair], gather(torch.cat(caption_rows), captions))
