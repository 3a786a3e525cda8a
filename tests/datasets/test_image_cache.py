"""Cache of decoded images: same pixels, rebuilt when a file changes, absent where it cannot be written."""

import errno
import logging
import os
import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import DataConfig
from datasets import image_cache
from datasets.annotations import Record, load_annotations
from datasets.image_cache import ImageCache, cached_images
from datasets.images import Images, read_image
from datasets.transforms import build_transform
from tests.helpers.loaders import fields_of, train_loader
from utils.errors import DataError


@pytest.fixture
def records(root: Path, tmp_path: Path) -> list[Record]:
    """Records of a few images that a test may change."""
    found = []
    for number, record in enumerate(load_annotations("synthetic", root).train[:5]):
        path = tmp_path / f"{number}.png"
        path.write_bytes(Path(record.image_path).read_bytes())
        found.append(Record(str(path), record.pid, record.image_id, record.captions, "train"))
    return found


def settings(tmp_path: Path, **options: Any) -> DataConfig:
    return DataConfig(
        **({"image_size": (64, 32), "workers": 0, "cache": "on", "cache_dir": str(tmp_path / "cache")} | options)
    )


def files(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache"))


def test_batches_are_the_same_with_and_without_it(root: Path, tmp_path: Path) -> None:
    options = {"cache_dir": str(tmp_path / "cache"), "train_resize": "bicubic"}
    plain = train_loader(root, cache="off", **options)
    for cached in (train_loader(root, cache="on", workers=workers, **options) for workers in (0, 1)):
        assert cached.pairs.images.cache is not None
        for a, b in zip(fields_of(plain.epoch(1)), fields_of(cached.epoch(1)), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(files(tmp_path)) == 1


def test_it_is_built_once_and_again_when_a_file_changes(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reads = settings(tmp_path), []
    monkeypatch.setattr(image_cache, "read_image", lambda path: reads.append(path) or read_image(path))
    cached_images(config, records, train=True)
    old = files(tmp_path)
    cached_images(config, records, train=True)
    assert len(reads) == len(records)
    Path(records[0].image_path).write_bytes(Path(records[1].image_path).read_bytes())
    os.utime(records[0].image_path, ns=(1, 1))
    cache = cached_images(config, records, train=True)
    assert cache is not None and len(files(tmp_path)) == 1 and files(tmp_path) != old  # the stale file is removed
    transform = build_transform(config, train=False)
    image = cache.get(records[0].image_path)
    assert image is not None and torch.equal(transform(image), transform(read_image(records[1].image_path)))
    cached_images(settings(tmp_path, image_size=(32, 16)), records, train=True)
    assert len(files(tmp_path)) == 2  # of another size


def test_an_unreadable_image_is_reported_as_without_it(records: list[Record], tmp_path: Path) -> None:
    Path(records[2].image_path).write_bytes(b"no image")
    cache = cached_images(settings(tmp_path), records, train=True)
    paths = [record.image_path for record in records]
    with pytest.raises(DataError, match="unreadable image"):
        Images(paths, skip_bad=False, cache=cache).read(2)
    skipping = Images(paths, skip_bad=True, cache=cache)
    assert skipping.read(2) is None and skipping.unreadable() == [paths[2]] and skipping.read(1) is not None


def test_a_full_disk_is_said_and_training_goes_on_without(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(image_cache.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(1000))
        assert cached_images(settings(tmp_path), records, train=True) is None
    assert "data.cache: no space, 5 images take 0.00 GiB" in caplog.text

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache.torch, "cat", full)  # called between the images and the end of the file
    assert cached_images(settings(tmp_path), records, train=True) is None
    assert "cannot be written" in caplog.text and "No space left" in caplog.text and files(tmp_path) == []


def test_a_killed_builder_leaves_no_cache(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_images(settings(tmp_path), records, train=True)
    (name,) = files(tmp_path)
    folder = tmp_path / "cache"
    half = folder / f".{name}.1.abc.tmp"  # as a kill leaves it
    (folder / name).rename(half)
    os.utime(half, (1, 1))
    assert cached_images(settings(tmp_path), records, train=True) is not None
    assert files(tmp_path) == [name]


def test_auto_leaves_small_sets_and_full_disks_alone(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(tmp_path, cache="auto")
    assert cached_images(config, records, train=True) is None and not (tmp_path / "cache").exists()
    monkeypatch.setattr(image_cache, "FEWEST", 5)
    needed = 5 * (64 * 32 * 3 + 1)
    for free, built in ((2 * needed - 1, False), (2 * needed, True)):
        monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder, free=free: namedtuple("U", "free")(free))
        assert (cached_images(config, records, train=True) is not None) == built
    with caplog.at_level(logging.INFO):
        assert cached_images(settings(tmp_path, cache="off"), records, train=True) is None


def test_workers_that_are_not_forked_open_the_file_again(records: list[Record], tmp_path: Path) -> None:
    cache = cached_images(settings(tmp_path), records, train=False)
    assert isinstance(cache, ImageCache)
    sent = pickle.dumps(cache)
    assert len(sent) < 2000 and pickle.loads(sent).get(records[0].image_path) == cache.get(records[0].image_path)


def test_the_folder_is_beside_the_data_or_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = DataConfig(root=str(tmp_path))
    assert image_cache._folder(config) == tmp_path / ".decoded"
    monkeypatch.setattr(image_cache.os, "access", lambda path, mode: False)
    assert image_cache._folder(config) == tmp_path / "home/.cache/decoded-images"
