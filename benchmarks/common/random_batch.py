"""Batches with random content."""

import torch

from configs.schema import Config
from model.task import RetrievalTask
from utils.batch import Batch
from utils.distributed import default_device
from utils.errors import ConfigError

NUM_PAIRS = 1000  # size of the imagined training set


def random_batch(config: Config, size: int, vocab_size: int) -> Batch:
    """All batch fields, with full support sets."""
    data = config.data
    height, width = data.image_size

    def captions(number: int) -> torch.Tensor:
        ids = torch.randint(1, vocab_size - 3, (number, data.text_length))
        ids[:, -1] = vocab_size - 1
        return ids

    batch = {
        "images": torch.randn(size, 3, height, width),
        "caption_ids": captions(size),
        "pids": torch.randint(10, (size,)),
        "index": torch.randint(NUM_PAIRS, (size,)),
        "support_images": torch.randn(size * data.support_images, 3, height, width),
        "support_caption_ids": captions(size * data.support_captions),
    }
    for kind, number in (("image", data.support_images), ("caption", data.support_captions)):
        batch[f"support_{kind}_mask"] = torch.ones(size, number, dtype=torch.bool)
        batch[f"support_{kind}_pairs"] = torch.randint(NUM_PAIRS, (size, number))
    return {name: value.to(default_device()) for name, value in batch.items()}


def require_fields(batch: Batch, task: RetrievalTask) -> None:
    """Raise `ConfigError` if the config's losses read fields that random batches lack."""
    if missing := task.inputs - batch.keys():
        raise ConfigError(
            f"--config: its losses need {', '.join(sorted(missing))}, which random batches lack; choose a config "
            "without them, such as configs/baseline.yaml"
        )
