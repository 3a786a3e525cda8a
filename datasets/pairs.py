"""Torch data sets: training pairs, gallery images, query captions; and how their items become a batch."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.annotations import Record
from datasets.extras import random_mask
from datasets.tokenizers import ClipTokenizer
from datasets.transforms import ImageTransform
from utils.batch import Batch
from utils.errors import DataError

TEXT_FIELDS = ("caption_ids", "mlm_ids", "mlm_labels")


class TrainPairs(Dataset[Batch]):
    """Every (image, caption) pair of the training records, in annotation order.

    What is random about a pair (augmentation, masking) is drawn from (seed, epoch, index) alone, so that it is the
    same whichever worker loads it.

    Args:
        records: training records.
        labels: pid -> label 0..C-1.
        transform: PIL image -> float tensor (3, H, W); may draw from torch's global generator.
        tokenizer: captions -> ids.
        fields: the batch fields to make, of utils/batch.py.
        seed: of the random draws.
    """

    def __init__(
        self,
        records: Sequence[Record],
        labels: dict[int, int],
        transform: ImageTransform,
        tokenizer: ClipTokenizer,
        fields: Collection[str],
        seed: int,
    ) -> None:
        self.pairs = [(record, caption) for record in records for caption in record.captions]
        self.labels, self.transform, self.tokenizer, self.fields, self.seed = labels, transform, tokenizer, fields, seed
        # Shared memory: workers that live on from the last epoch see the new number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Batch:
        record, caption = self.pairs[index]
        entropy = np.random.SeedSequence([self.seed, int(self._epoch), index])
        item = {"index": torch.tensor(index), "pids": torch.tensor(self.labels[record.pid])}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))  # not the GPUs', too
            item["images"] = self.transform(read_image(record.image_path))
        item["caption_ids"] = self.tokenizer.encode(caption)
        if "mlm_ids" in self.fields:
            rng = np.random.default_rng(entropy)
            item["mlm_ids"], item["mlm_labels"] = random_mask(item["caption_ids"], self.tokenizer.mask_id, rng)
        return item


class GalleryImages(Dataset[Batch]):
    """The images of a split, in annotation order, with their raw pids."""

    def __init__(self, records: Sequence[Record], transform: ImageTransform) -> None:
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        record = self.records[index]
        return {"images": self.transform(read_image(record.image_path)), "pids": torch.tensor(record.pid)}


class QueryCaptions(Dataset[Batch]):
    """The captions of a split, in annotation order, with their images' raw pids."""

    def __init__(self, records: Sequence[Record], tokenizer: ClipTokenizer) -> None:
        self.captions = [(record.pid, caption) for record in records for caption in record.captions]
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Batch:
        pid, caption = self.captions[index]
        return {"caption_ids": self.tokenizer.encode(caption), "pids": torch.tensor(pid)}


def read_image(path: str) -> Image.Image:
    """The image as RGB.

    Raises:
        DataError: it is missing, truncated or no image; the message names the path.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Exception as error:  # PIL's decoders raise errors of many types on damaged files
        raise DataError(f"{path}: this image cannot be read ({error})") from None


class Collate:
    """Items -> Batch: stacked; text cut to the longest caption unless `full_text`; only the fields asked for.

    Cutting changes no output (the text tower is causal, what follows the end of a caption is not looked at) and
    saves the tower the padding. It is done here, on the CPU, where looking at the ids makes no GPU wait.
    """

    def __init__(self, fields: Collection[str] | None = None, *, full_text: bool = False) -> None:
        self.fields, self.full_text = fields, full_text

    def __call__(self, items: Sequence[Batch]) -> Batch:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        if "caption_ids" in batch and not self.full_text:
            length = longest(batch["caption_ids"])
            batch |= {name: batch[name][:, :length].contiguous() for name in TEXT_FIELDS if name in batch}
        if "mlm_labels" in batch:
            batch["mlm_positions"] = batch["mlm_labels"].flatten().nonzero().squeeze(1)
        return batch if self.fields is None else {name: batch[name] for name in batch if name in self.fields}


def longest(caption_ids: Tensor) -> int:
    """The number of columns of (B, L) ids up to the last one that is not padding in every row."""
    return int(caption_ids.any(dim=0).nonzero().max()) + 1
