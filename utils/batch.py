"""Contents of a batch, the common format of `datasets`, `model` and `processor`."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from utils.sharding import Shard

Batch: TypeAlias = dict[str, Tensor]

# A micro-batch has R rows: one for each view or text of a pair. L columns of text reach to its longest caption, unless
# full-length text is asked for. A support set has M slots, and K tokens are masked in all. A task names the fields that
# it needs, and the loaders make no others.
FIELDS: Mapping[str, str] = {
    "index": "int64 (R,): position of the row's pair in the training list",
    "images": "float32 (R, 3, H, W): normalised",
    "caption_ids": "int64 (R, L): token ids, 0 = padding",
    "pids": "int64 (R,): training identities, relabelled 0..C-1",
    "image_ids": "int64 (R,): number of the row's image in its split",
    "support_images": "float32 (S, 3, H, W): other images of the identities, without empty slots",
    "support_image_mask": "bool (R, M): occupied slots",
    "support_image_pairs": "int64 (R, M): training pairs that these images belong to",
    "support_caption_ids": "int64 (S', L'): other captions of the identities, without empty slots",
    "support_caption_mask": "bool (R, M): occupied slots",
    "support_caption_pairs": "int64 (R, M): training pairs that these captions belong to",
    "clean": "bool (R,): False where noise replaced the caption",
    "mlm_ids": "int64 (R, L): caption_ids with some tokens masked or replaced",
    "mlm_labels": "int64 (R, L): the original token where it is to be predicted, else 0",
    "mlm_positions": "int64 (K,): non-zero positions of mlm_labels.flatten(), found on the CPU to avoid a device sync",
}


class MicroBatch(NamedTuple):
    """Rows of a batch for one pass of the towers, and their relation to the rows of other processes."""

    fields: Batch
    shard: Shard

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(to_device(self.fields, device), self.shard)


def to_device(fields: Batch, device: torch.device) -> Batch:
    """The fields on `device`; copies from pinned memory do not block."""
    return {name: value.to(device, non_blocking=True) for name, value in fields.items()}


def send(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on `device`; the copy does not block."""
    return (values if device.type == "cpu" else values.pin_memory()).to(device, non_blocking=True)


def caption_mask(caption_ids: Tensor) -> Tensor:
    """Mask of the columns up to the last token, the first column always included: ids (B, L) -> bool (B, L)."""
    mask = caption_ids.flip(1).cumsum(dim=1).flip(1) > 0
    mask[:, 0] = True
    return mask


def end_of_text(caption_ids: Tensor) -> Tensor:
    """Position of the end-of-text token, the largest id in CLIP's vocabulary: (..., L) -> int64 (...)."""
    return caption_ids.argmax(dim=-1)
