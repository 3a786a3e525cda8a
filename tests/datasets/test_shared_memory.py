"""Shared memory of the data loading workers: compared with what there is, and reported when it runs out."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import DataConfig
from datasets import shared_memory
from datasets.loaders import eval_loader
from datasets.shared_memory import require_shared_memory
from processor import training
from tests.helpers.configs import config_of
from utils.errors import ConfigError
from utils.faults import machine_fault

Usage = namedtuple("Usage", "free")
IMAGE = 3 * 64 * 32  # bytes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(images: int) -> None:
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda folder: Usage(images * IMAGE))

    return has


def test_the_batches_on_their_way_are_compared_with_the_free_space(small: Any, monkeypatch, tmp_path: Path) -> None:
    config = DataConfig(image_size=[256, 128])
    small(50 * 16)
    require_shared_memory(config, workers=2, images=10, total=999)  # two batches of each worker, and one in use
    require_shared_memory(config, workers=4, images=10, total=50)  # a small data set
    require_shared_memory(config, workers=0, images=999, total=999)
    message = r"data\.workers: 2 .* 6 MiB .* 60 images, got 5 MiB free in /dev/shm; set data\.workers=0.*--shm-size=8g"
    with pytest.raises(ConfigError, match=message):
        require_shared_memory(config, workers=2, images=10, total=999, held=2)
    with pytest.raises(ConfigError, match="19 MiB"):  # augmentations on floats
        require_shared_memory(config, workers=2, images=10, total=999, depth=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="100 images"):
        require_shared_memory(config, workers=2, images=10, total=999)
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "missing")  # macOS, Windows
    require_shared_memory(config, workers=2, images=10, total=999)


@pytest.mark.parametrize("overrides", [["data.views=2"], ["eval.batch_size=16"]])
def test_training_and_evaluation_ask_before_the_first_step(
    overrides: list[str], root: Path, tmp_path: Path, small: Any
) -> None:
    small(7 if overrides == ["eval.batch_size=16"] else 40)
    with pytest.raises(ConfigError, match=r"data\.workers: 1 data loading workers need"):
        training.train(config_of("irra", root, "data.workers=1", *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Unsendable:
    """Data set whose batches cannot be sent: pickling them fails in a thread of the worker."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return {"images": Full() if index == 1 else torch.zeros(1)}


class Full(torch.Tensor):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )


@pytest.mark.timeout(60)
def test_a_batch_that_cannot_be_sent_is_an_error_and_not_waited_for(monkeypatch) -> None:
    loader = eval_loader(Unsendable(), 1, workers=1)  # type: ignore[arg-type]
    loader.collate_fn = lambda items: items[0]
    batches = iter(loader)
    next(batches)
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    assert str(machine_fault(caught.value)).startswith("/dev/shm: too little shared memory")
