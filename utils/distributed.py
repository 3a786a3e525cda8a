"""Devices and processes. No other file names a device."""

import contextlib
import contextvars
import datetime
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import ConfigError
from utils.launcher import number_in

_ALONE = contextvars.ContextVar("alone", default=False)


def start_processes(timeout: float = 600) -> torch.device:
    """Join the process group that `torchrun` describes, if any; returns this process's device.

    Args:
        timeout: seconds to wait for other processes, at the start and later.
    """
    device = default_device()
    if number_in(os.environ, "WORLD_SIZE") > 1 and not dist.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler in Python would wait for collectives to return
        if device.type == "cuda":
            visible = torch.cuda.device_count()
            # srun --gpus-per-task=1 shows each process its GPU only
            alone = visible == 1 and "SLURM_PROCID" in os.environ
            device = torch.device("cuda", 0 if alone else int(os.environ["LOCAL_RANK"]))
            if local_processes() > visible and not alone:
                raise ConfigError(
                    f"torchrun --nproc_per_node: this machine has {visible} GPUs, "
                    f"got {local_processes()} processes; start one process per GPU"
                )
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return device


def end_processes() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_processes() -> int:
    """Number of processes on this machine."""
    return number_in(os.environ, "LOCAL_WORLD_SIZE") or 1


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Run the body in the first process, then in all others."""
    if rank() == 0:
        yield
    if world_size() > 1:
        dist.barrier()
    if rank():
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run the body as if there were no other process: a calculation that the others take no part in."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() and not _ALONE.get() else 1


def rank() -> int:
    """Number of this process; process 0 writes the run folder."""
    return dist.get_rank() if dist.is_initialized() and not _ALONE.get() else 0


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean over processes (no gradient)."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values / world_size()


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in order; plain Python values and CPU tensors."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class Announcement:
    """Number that one process announces and all processes learn of in the same step, which is the next one."""

    def __init__(self) -> None:
        self._sent: tuple[dist.Work, Tensor] | None = None

    def exchange(self, number: int) -> int:
        """The largest number that a process gave at the call before; 0 at first. No process waits for another."""
        if world_size() == 1:
            return number
        largest = 0
        if self._sent is not None:
            work, received = self._sent
            work.wait()
            largest = int(received)
        sent = torch.tensor(number)
        work = dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._sent = work, sent
        return largest


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory(device: torch.device) -> float | None:
    """Peak memory of this process in GiB: allocated on the GPU, or resident if the device is the CPU.

    Windows does not count the latter: None.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_name(device: torch.device) -> str:
    """Name of the GPU, or number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def describe_device(device: torch.device) -> str:
    """Name of the device and number of processes, for the log."""
    name = device_name(device)
    return name if world_size() == 1 else f"{world_size()} processes, {name} each"


def unlike_devices(device: torch.device) -> str | None:
    """Number of processes on each kind of device, for the log, if there are several kinds; a collective."""
    kinds = Counter(gather_objects(device_name(device)))
    return ", ".join(f"{number} x {name}" for name, number in kinds.items()) if len(kinds) > 1 else None
