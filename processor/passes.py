"""Forward passes of a task on several processes: torch averages the gradients, or shards the parameters."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from utils.distributed import gather_objects, world_size
from utils.logger import LOGGER

OF_DDP = inspect.signature(DistributedDataParallel).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in OF_DDP else "broadcast_buffers"  # new in torch 2.15


class Passes(nn.Module):
    """Functions of a task as forward passes of one module, so that the hooks of torch.distributed see each of them.

    Args:
        task: the task.
    """

    sharded = False  # every pass is a collective

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, function: Callable[..., Any], *args: Any, sync: bool = True) -> Any:
        """Call the function.

        Args:
            function: function that uses the parameters of the task.
            args: its arguments.
            sync: False if another backward pass of the same batch follows, so that gradients need not be averaged yet.
                Sharded gradients are averaged in each pass, because before that they are as large as unsharded ones.
        """
        return function(*args)


class ReplicatedPasses:
    """The same with `DistributedDataParallel`, which averages gradients over processes during the backward pass.

    The first pass that reaches a parameter runs before the wrapper exists, because its graph tells whether there are
    parameters without a gradient.

    Args:
        passes: passes of the task, which is equal on all processes.
    """

    sharded = False

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.wrapped: DistributedDataParallel | None = None

    def __call__(self, function: Callable[..., Any], *args: Any, sync: bool = True) -> Any:
        if self.wrapped is None:
            output = function(*args)
            missed = self._missed(output)
            if missed is None:
                return output
            self.wrapped = self._wrap(missed)
            function, args = (lambda: output), ()
        with nullcontext() if sync else self.wrapped.no_sync():
            return self.wrapped(function, *args)

    def _missed(self, output: Any) -> list[str] | None:
        """Names of the parameters that a backward pass from the output does not reach; None if it reaches none."""
        reached = {node.variable for node in graph_of(tree_leaves(output)) if hasattr(node, "variable")}
        trained = [(name, one) for name, one in self.passes.task.named_parameters() if one.requires_grad]
        missed = [name for name, one in trained if one not in reached]
        return None if len(missed) == len(trained) else missed

    def _wrap(self, missed: list[str]) -> DistributedDataParallel:
        unused = list(dict.fromkeys(name for names in gather_objects(missed) for name in names))
        if unused:
            listed = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            LOGGER.info("find_unused_parameters is on: a backward pass does not reach %d (%s)", len(unused), listed)
        wrapped = DistributedDataParallel(
            self.passes,
            find_unused_parameters=bool(unused),
            gradient_as_bucket_view=True,
            init_sync=False,  # all processes have the same weights, and the graph of this pass holds them already
            **{BUFFERS: False},  # type: ignore[arg-type]
        )
        if not unused:
            settle_buckets(wrapped)
        return wrapped


def settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Run a backward pass without result on CPU, because the wrapper rebuilds its buckets after the first one.

    The order of a sum over three or more processes depends on the buckets. A resumed run then has the sums of the
    straight one.
    """
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    if parameters[0].device.type == "cpu":
        wrapped(lambda: torch.stack([parameter.sum() for parameter in parameters]).sum()).backward()
        wrapped.zero_grad()


def shard(passes: Passes, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shard the parameters of a task over all processes, those of each block and the rest, by FSDP2.

    They move to `device` block by block, so that it never holds all of them.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*blocks, passes):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    passes.sharded = True


def graph_of(tensors: Iterable[Any]) -> Iterator[Any]:
    """Nodes of the autograd graph of some tensors, each once."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if isinstance(tensor, Tensor)]
    seen: set[Any] = {None}
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
