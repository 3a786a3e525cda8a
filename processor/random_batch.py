"""Batches with random content, for measurements; on fake tensors, batches without content."""

from collections.abc import Collection

import torch
from torch import Tensor

from configs.schema import Config
from utils.batch import Batch, MicroBatch
from utils.sharding import split_batch

NUM_PAIRS = 1000  # size of the imagined training set
MASKED = 0.15  # fraction of the tokens of a caption that IRRA predicts


def rows_per_pair(config: Config) -> int:
    """Number of rows of a pair in a batch: its views or its texts."""
    return max(config.data.views, len(config.data.text_levels))


def random_batch(
    config: Config,
    pairs: int,
    vocab_size: int,
    fields: Collection[str],
    *,
    columns: int | None = None,
    device: torch.device | None = None,
) -> Batch:
    """A batch with full support sets, whose captions fill all columns.

    Args:
        config: the experiment.
        pairs: number of pairs.
        vocab_size: vocabulary size of the encoder.
        fields: batch fields to make, from utils/batch.py.
        columns: tokens of a caption; None is `data.text_length`.
        device: device of the tensors; None is torch's default.
    """
    data, rows, columns = config.data, pairs * rows_per_pair(config), columns or config.data.text_length
    slots = {"image": data.support_images, "caption": data.support_captions}

    def images(number: int) -> Tensor:
        return torch.randn(number, 3, *data.image_size, device=device)

    def captions(number: int) -> Tensor:
        ids = torch.randint(1, vocab_size - 3, (number, columns), device=device)
        ids[:, -1] = vocab_size - 1  # end of text, the largest id
        return ids

    batch: Batch = {}
    for name, most in (("pids", 2), ("index", NUM_PAIRS), ("image_ids", NUM_PAIRS)):
        batch[name] = torch.randint(most, (rows,), device=device)
    batch |= {"images": images(rows), "caption_ids": captions(rows)}
    if "clean" in fields:
        batch["clean"] = torch.ones(rows, dtype=torch.bool, device=device)
    if "mlm_ids" in fields:
        batch |= _masked(batch["caption_ids"], mask_id=vocab_size - 3)
    for kind, number in slots.items():
        batch[f"support_{kind}_mask"] = torch.ones(rows, number, dtype=torch.bool, device=device)
        batch[f"support_{kind}_pairs"] = torch.randint(NUM_PAIRS, (rows, number), device=device)
    for name, make, kind in (("images", images, "image"), ("caption_ids", captions, "caption")):
        if f"support_{name}" in fields:
            batch[f"support_{name}"] = make(rows * slots[kind])
    return {name: value for name, value in batch.items() if name in fields}


def _masked(caption_ids: Tensor, mask_id: int) -> Batch:
    """Fields of masked language modelling: the same evenly spaced columns in every row, never the first or the last."""
    rows, columns = caption_ids.shape
    number = max(1, round(MASKED * (columns - 2)))
    chosen = 1 + torch.arange(number, device=caption_ids.device) * (columns - 2) // number
    ids, labels = caption_ids.clone(), torch.zeros_like(caption_ids)
    labels[:, chosen] = caption_ids[:, chosen]
    ids[:, chosen] = mask_id
    first = columns * torch.arange(rows, device=caption_ids.device)
    return {"mlm_ids": ids, "mlm_labels": labels, "mlm_positions": (first[:, None] + chosen).flatten()}


def micro_batches_of(batch: Batch, number: int, rows_per_pair: int = 1) -> list[MicroBatch]:
    """Split a batch of `random_batch` in the same way as the data loader of a single process."""
    rows = len(batch["pids"])
    shards = split_batch(rows // rows_per_pair, number, rows_per_pair)
    sizes = [shard.num_local_rows for shard in shards]
    parts: list[Batch] = [{} for _ in shards]
    for name, value in batch.items():
        each = len(value) // rows  # of a support set or of masked positions
        for part, piece in zip(parts, value.split([each * size for size in sizes]), strict=True):
            part[name] = piece
    if "mlm_positions" in batch:
        for part, first in zip(parts, [sum(sizes[:number]) for number in range(len(sizes))], strict=True):
            part["mlm_positions"] = part["mlm_positions"] - first * batch["mlm_ids"].shape[1]
    return [MicroBatch(part, shard) for part, shard in zip(parts, shards, strict=True)]
