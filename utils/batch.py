"""What a batch holds: the one thing that `datasets`, `model` and `processor` all know."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]

# B pairs in a batch, M slots in the support set of each, L columns of text (the longest caption of the batch, unless
# full-length text is asked for), K masked tokens in the whole batch. A task names the fields it needs; the loaders
# make those and no others.
FIELDS: Mapping[str, str] = {
    "index": "int64 (B,): position of each pair in the training list",
    "images": "float32 (B, 3, H, W): normalised",
    "caption_ids": "int64 (B, L): token ids, 0 = padding",
    "pids": "int64 (B,): identities, relabelled 0..C-1 in training",
    "image_ids": "int64 (B,): number of each pair's image in its split",
    "support_images": "float32 (R, 3, H, W): other images of the identities, the real ones of all pairs in a row",
    "support_image_mask": "bool (B, M): which slots are real",
    "support_image_pairs": "int64 (B, M): training pairs that have those images",
    "support_caption_ids": "int64 (S, L'): other captions of the identities, the real ones of all pairs in a row",
    "support_caption_mask": "bool (B, M): which slots are real",
    "support_caption_pairs": "int64 (B, M): training pairs that have those captions",
    "clean": "bool (B,): false where noise gave the pair a caption that is not its own",
    "mlm_ids": "int64 (B, L): caption_ids with some tokens masked or replaced",
    "mlm_labels": "int64 (B, L): the original token where mlm_ids asks for it, else 0",
    "mlm_positions": "int64 (K,): where mlm_labels.flatten() is not 0, found on the CPU so that no GPU has to wait",
}


# Where W processes train, or a batch comes in parts, "shards", int64 (W,) on the CPU, says how many pairs of this part
# of the whole batch each process has.


def caption_mask(caption_ids: Tensor) -> Tensor:
    """bool (B, L): the columns of ids (B, L) up to the last that is no padding, the first one in any case."""
    mask = caption_ids.flip(1).cumsum(dim=1).flip(1) > 0
    mask[:, 0] = True
    return mask


def num_pairs(batch: Batch) -> int:
    """Those that all processes have."""
    return int(batch["shards"].sum()) if "shards" in batch else len(batch["index"])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, but for its `shards`; copies from pinned memory do not block."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "shards"}
    return moved | {name: value for name, value in batch.items() if name == "shards"}
