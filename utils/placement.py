"""Tensors that are sharded over processes (`train.shard`): gathered for a checkpoint, and split again."""

from typing import TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from utils.distributed import rank

State = TypeVar("State")


def gathered(state: State) -> State:
    """Gather all sharded tensors in nested mappings and lists, one after the other; a collective.

    The first process has them on its CPU. They are empty on all others.
    """
    found: State = tree_map_only(DTensor, _gathered, state)
    return found


def _gathered(value: DTensor) -> Tensor:
    full: Tensor = value.full_tensor()
    return full.cpu() if rank() == 0 else full.new_empty(0)


def placed_as(like: Tensor, value: Tensor) -> Tensor:
    """Shard a tensor, which all processes have, in the way of another one; as it is if that is not sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(value: Tensor) -> Tensor:
    """The shard of this process, which shares its memory."""
    return value.to_local() if isinstance(value, DTensor) else value
