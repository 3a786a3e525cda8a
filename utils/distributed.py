"""The only file that knows which devices there are, and which other processes train with this one.

Every process of `torchrun` trains on its part of each batch. Embeddings are gathered with their gradient, so that each
process computes the loss of the whole batch; what a process says of its own part alone is weighted by `shares`. The
mean of the processes' gradients is then the gradient that one process would have.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from utils.errors import ConfigError

BUCKET = 2**22  # numbers per message when gradients are averaged


def start_processes() -> torch.device:
    """Join the other processes of `torchrun`, if there are any; returns the device of this one."""
    device = default_device()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if local_processes() > torch.cuda.device_count():
                raise ConfigError(
                    f"torchrun --nproc_per_node={local_processes()}: this machine has {torch.cuda.device_count()} GPUs"
                )
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def end_processes() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_processes() -> int:
    """Those on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """What is in here is done by the first process, and by the others when that has ended."""
    if rank() == 0:
        yield
    if world_size() > 1:
        dist.barrier()
    if rank():
        yield


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes the run folder."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard_sizes(size: int, parts: int = 1) -> list[int]:
    """How a batch of `size` pairs is split, into so many parts of each process, one process after the other.

    The first parts have one more where it does not come out even.
    """
    shards = world_size() * parts
    return [size // shards + (number < size % shards) for number in range(shards)]


def own_shard(sizes: Sequence[int]) -> slice:
    """Where this process's shard lies, of shards of these sizes, one of each process."""
    first = sum(sizes[: rank()])
    return slice(first, first + sizes[rank()])


def gather(local: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes in order, with gradient: (n, ...) -> (sum of sizes, ...).

    Args:
        local: this process's rows, sizes[rank] of them.
        sizes: of every process.
    """
    return local if world_size() == 1 else _Gather.apply(local, sizes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.sizes = sizes
        as_sent = local.byte() if local.dtype == torch.bool else local
        padded = as_sent.new_zeros(max(sizes), *local.shape[1:])
        padded[: len(local)] = as_sent
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(local.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)  # every process's loss depends on these rows
        return gradient[own_shard(ctx.sizes)], None


def shares(counts: Tensor) -> Tensor:
    """What means over so many things count for: int64 (parts, kinds), of this process, -> float64 of the same shape.

    The mean over the processes of the sum over the parts is then the mean over all things of a kind.
    """
    total = counts.sum(dim=0)
    if world_size() > 1:
        dist.all_reduce(total)
    return counts * world_size() / total.clamp(min=1).double()


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Give every process the mean of all processes' gradients."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    bucket: list[Tensor] = []
    for gradient, following in zip(gradients, [*gradients[1:], None], strict=True):
        bucket.append(gradient)
        full = sum(one.numel() for one in bucket) >= BUCKET
        if full or following is None or following.dtype != gradient.dtype:
            flat = torch.cat([one.flatten() for one in bucket])
            dist.all_reduce(flat)
            flat /= world_size()
            for one, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                one.copy_(part.view_as(one))
            bucket = []


def mean_of_processes(values: Tensor) -> Tensor:
    """Without gradient."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values / world_size()


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in order; plain Python values and tensors on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory(device: torch.device) -> float:
    """GiB that the process has had allocated at most: on the GPU, or resident where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def describe_device(device: torch.device) -> str:
    """For the log: the GPU's name, or the number of CPU threads; and how many processes there are."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return name if world_size() == 1 else f"{world_size()} processes, {name} each"
