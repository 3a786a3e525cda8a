"""Cache of decoded images: resized once, 8 bits, in a memory-mapped file that all workers and processes read."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as T

from configs.schema import DataConfig
from datasets.annotations import Record
from datasets.images import read_image
from datasets.transforms import RESIZE
from datasets.workers import data_loader, num_workers
from utils.distributed import first_alone
from utils.errors import DataError, first_line
from utils.files import replacing
from utils.logger import LOGGER, progress

VERSION = 1  # of the file format
FEWEST = 2000  # images that `data.cache=auto` decodes once; fewer are decoded in a second or two
LEFT_BEHIND = 3600.0  # seconds after which a temporary file belongs to a process that was killed
BATCH = 8  # images that a worker sends at a time


class ImageCache:
    """Decoded images by path.

    Args:
        path: file with the pixels (N, H, W, 3) and N flags of readable images.
        images: paths of the N images.
        size: height and width.
    """

    def __init__(self, path: Path, images: Sequence[str], size: tuple[int, int]) -> None:
        self.path, self.images, self.size = path, images, size
        self.rows = {image: row for row, image in enumerate(images)}
        shape = (len(images), *size, 3)
        self.pixels = np.memmap(path, np.uint8, "r", shape=shape)
        self.readable = np.fromfile(path, bool, offset=self.pixels.size)

    def __reduce__(self) -> tuple[type["ImageCache"], tuple[Path, Sequence[str], tuple[int, int]]]:
        """Pickle the name of the file, not its content, for workers that are not forked."""
        return ImageCache, (self.path, self.images, self.size)

    def get(self, path: str) -> Image.Image | None:
        """The image at its cached size; None if it is not cached or could not be read."""
        row = self.rows.get(path)
        return None if row is None or not self.readable[row] else Image.fromarray(self.pixels[row])


def cached_images(config: DataConfig, records: Sequence[Record], *, train: bool) -> ImageCache | None:
    """The cache of a split's images, built by the first process if need be; None without one.

    Args:
        config: data settings.
        records: records of the split.
        train: resize by `train_resize` instead of bilinearly.
    """
    paths = sorted({record.image_path for record in records})
    if config.cache == "off" or (config.cache == "auto" and len(paths) < FEWEST):
        return None
    filtering = config.train_resize if train else "bilinear"
    folder = _folder(config)
    group = _digest([VERSION, PIL.__version__, filtering, config.image_size, paths])
    file = folder / f"{group}-{_digest([_state(path) for path in paths])}.uint8"
    with first_alone():
        if not file.exists() and _fits(config, len(paths), folder):
            _build(config, paths, filtering, file)
    return ImageCache(file, paths, config.image_size) if file.exists() else None


def _folder(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    root = Path(config.root)
    return root / ".decoded" if os.access(root, os.W_OK) else Path.home() / ".cache" / "decoded-images"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _state(path: str) -> tuple[int, int]:
    """Size and time of change of a file; a changed one makes a new cache."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _fits(config: DataConfig, images: int, folder: Path) -> bool:
    """True if the disk has space; the log says the numbers."""
    height, width = config.image_size
    needed = images * (height * width * 3 + 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        LOGGER.warning("data.cache: %s cannot be used (%s); images are decoded in every epoch", folder, error)
        return False
    wanted = 2 * needed if config.cache == "auto" else needed
    numbers = f"{images} images take {needed / 2**30:.2f} GiB of {free / 2**30:.2f} GiB free in {folder}"
    if wanted > free:
        LOGGER.warning("data.cache: no space, %s; images are decoded in every epoch; set data.cache_dir", numbers)
        return False
    LOGGER.info("data.cache: decoding once, %s; data.cache=off decodes in every epoch", numbers)
    return True


def _build(config: DataConfig, paths: Sequence[str], filtering: str, file: Path) -> None:
    """Write the file. It appears when it is complete; a second builder replaces it by an equal one."""
    group = file.name.split("-")[0]
    _remove([old for old in file.parent.glob(f".{group}-*.tmp") if _age(old) > LEFT_BEHIND])
    decoded = data_loader(
        _Decoded(paths, config.image_size, filtering),
        workers=num_workers(config),
        timeout=config.timeout,
        batch_size=BATCH,
    )
    readable = []
    try:
        with replacing(file) as content:
            for pixels, flags in progress(decoded, "decoding images once"):
                content.write(pixels.numpy().data)
                readable.append(flags)
            content.write(torch.cat(readable).numpy().data)
    except OSError as error:
        LOGGER.warning(
            "data.cache: %s cannot be written (%s); images are decoded in every epoch; free some space, or set "
            "data.cache_dir",
            *(file, first_line(error)),
        )
        return
    _remove([old for old in file.parent.glob(f"{group}-*.uint8") if old != file])  # of images that changed


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # gone by now
        return 0.0


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


class _Decoded(Dataset[tuple[Tensor, bool]]):
    """Pixels uint8 (H, W, 3) of each image, and True; zeros and False if it cannot be read."""

    def __init__(self, paths: Sequence[str], size: tuple[int, int], filtering: str) -> None:
        self.paths, self.size, self.resize = paths, size, T.Resize(size, RESIZE[filtering])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        try:
            return torch.from_numpy(np.array(self.resize(read_image(self.paths[index])))), True
        except DataError:
            return torch.zeros(*self.size, 3, dtype=torch.uint8), False
