"""Shared memory, through which data loading workers send their batches: what they need, and what there is."""

import shutil
from pathlib import Path

from configs.schema import DataConfig
from utils.distributed import local_processes
from utils.errors import ConfigError
from utils.faults import MORE_SHARED_MEMORY

FOLDER = Path("/dev/shm")  # of Linux; other systems have no fixed size
PREFETCHED = 2  # batches of each worker that wait for the main process, torch's default


def require_shared_memory(
    config: DataConfig, *, workers: int, images: int, total: int, held: int = 1, depth: int = 1
) -> None:
    """Compare the images on their way to all processes of this machine with the free space of /dev/shm.

    Training and evaluation take turns: a loader that waits for its next epoch holds no batch.

    Args:
        config: data settings.
        workers: number of workers of each process.
        images: number of images in a batch.
        total: number of images that a process loads in an epoch.
        held: number of batches that the process works with.
        depth: bytes of a pixel's colour: 1, or 4 if augmentations need floats.

    Raises:
        ConfigError: there is less shared memory.
    """
    if workers == 0 or not FOLDER.is_dir():
        return
    height, width = config.image_size
    number = min((PREFETCHED * workers + held) * images, total) * local_processes()
    needed, free = number * 3 * height * width * depth, shutil.disk_usage(FOLDER).free
    if needed > free:
        raise ConfigError(
            f"data.workers: {workers} data loading workers need {needed / 2**20:.0f} MiB of shared memory for "
            f"{number} images, got {free / 2**20:.0f} MiB free in {FOLDER}; {MORE_SHARED_MEMORY}"
        )
