"""Data loading workers: their number, and what they leave to the main process."""

import os
import sys
from collections.abc import Sequence
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from configs.schema import DataConfig
from utils.distributed import local_processes
from utils.signals import leave_signals_to_main


def num_workers(config: DataConfig) -> int:
    """Number of data loading workers of this process, at most one per core."""
    if config.workers is None:
        return max(1, min(num_cores() // local_processes(), 8))
    return min(config.workers, num_cores())


def worker_notes(config: DataConfig) -> list[str]:
    """A remark for the log if the config, perhaps of a bigger machine, asks for more workers than cores."""
    if num_workers(config) == config.workers or config.workers is None:
        return []
    return [f"data.workers: {num_workers(config)} in place of {config.workers}, one per core of this machine"]


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_to_main(worker: int) -> None:
    """Leave signals and errors to the main process.

    A batch that it cannot send, for instance because shared memory is full, would be lost, and waited for. Its error is
    sent instead. Python keeps `_on_queue_feeder_error` for this purpose.
    """
    leave_signals_to_main()
    Queue._on_queue_feeder_error = send_error  # type: ignore[attr-defined]
    sys.excepthook = lambda *error: None  # an interrupted main process closes the connection


def send_error(queue: "Queue[Any]", error: Exception, sent: Sequence[Any]) -> None:
    """Send the error of a batch, `sent`, in its place; torch raises it in the main process."""
    where = f"in DataLoader worker process {os.getpid()}"
    queue.put((sent[0], ExceptionWrapper((type(error), error, error.__traceback__), where)))


def data_loader(dataset: Dataset[Any], *, workers: int, timeout: float, **options: Any) -> DataLoader[Any]:
    """A data loader that draws nothing from the model's generator; `options` are those of torch."""
    return DataLoader(
        dataset,
        num_workers=workers,
        timeout=timeout if workers else 0,
        worker_init_fn=leave_to_main,
        generator=torch.Generator(),
        persistent_workers=workers > 0,  # they start once, whatever the number of epochs and evaluations
        **options,
    )
