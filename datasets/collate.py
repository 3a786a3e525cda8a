"""Collation of items into a batch."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from utils.batch import Batch

TEXT_FIELDS = ("caption_ids", "mlm_ids", "mlm_labels")


class Collate:
    """Concatenate items, keep the requested fields, and cut text to the longest caption of the batch.

    Empty items (skipped images) are left out. Cutting changes no embedding, because CLIP's text tower is causal and
    IVT's masks padding. It happens on the CPU, where finding the longest caption causes no device sync.

    Args:
        fields: batch fields to keep, with those of their raw images (utils/pixels.py); None keeps all.
        full_text: keep all columns of text.
    """

    def __init__(self, fields: Collection[str] | None = None, *, full_text: bool = False) -> None:
        self.fields, self.full_text = fields, full_text

    def __call__(self, items: Sequence[Batch]) -> Batch:
        items = [item for item in items if item]
        batch = {name: torch.cat([item[name] for item in items]) for name in items[0]} if items else {}
        if "caption_ids" in batch and not self.full_text:
            length = longest(batch["caption_ids"])
            batch |= {name: batch[name][:, :length].contiguous() for name in TEXT_FIELDS if name in batch}
            support = batch.get("support_caption_ids")
            if support is not None and len(support):
                batch["support_caption_ids"] = support[:, : longest(support)].contiguous()
        if "mlm_labels" in batch:
            batch["mlm_positions"] = batch["mlm_labels"].flatten().nonzero().squeeze(1)
        return (
            batch if self.fields is None else {name: batch[name] for name in batch if name.split("/")[0] in self.fields}
        )


def longest(caption_ids: Tensor) -> int:
    """Number of columns of ids (B, L) up to the last one that is not padding in all rows."""
    return int(caption_ids.any(dim=0).nonzero().max()) + 1
