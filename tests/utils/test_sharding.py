"""Sharding of a batch over processes and micro-batches, and gathering of its rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.processes import together
from utils.distributed import gather_objects, rank
from utils.sharding import Shard, gather, local_slice, micro_batch_weights, shard_sizes, split_batch


def _gathered(size: int) -> tuple[Any, ...]:
    sizes = shard_sizes(size)
    first = sum(sizes[: rank()])
    whole = torch.arange(size * 3, dtype=torch.float64).view(size, 3) / 7
    local = whole[first : first + sizes[rank()]].clone().requires_grad_()
    found = gather(local, sizes)
    weights = torch.linspace(1, 2, size, dtype=torch.float64)[:, None]
    (weights * found.square()).sum().backward()
    flags = gather(torch.tensor([True, False, True])[: sizes[rank()]], sizes)
    mean = local.detach().sum() / max(len(local), 1) * micro_batch_weights(torch.tensor([[len(local)]])).item()
    return found.detach().numpy(), local.grad.numpy(), flags.numpy(), float(mean), gather_objects(rank())  # type: ignore[union-attr]


@pytest.mark.parametrize("world, size", [(2, 4), (2, 5), (3, 7), (3, 2)])
def test_gathering(world: int, size: int) -> None:
    whole = torch.arange(size * 3, dtype=torch.float64).view(size, 3) / 7
    expected = 2 * whole * torch.linspace(1, 2, size, dtype=torch.float64)[:, None]
    results = together(world, _gathered, size)
    gradients = torch.cat([torch.from_numpy(gradient) for _, gradient, *_ in results])
    torch.testing.assert_close(gradients / world, expected)  # summed over processes; averaged later
    for found, _, flags, _, order in results:
        assert torch.equal(torch.from_numpy(found), whole) and order == list(range(world)) and len(flags) == size
    means = [mean for *_, mean, _ in results]
    assert sum(means) / world == pytest.approx(float(whole.sum()) / size)


def test_micro_batches_split_a_batch_evenly() -> None:
    for size in range(1, 30):
        for micro_batches in (1, 2, 3, 8):
            shards = split_batch(size, micro_batches, rows_per_pair=3)
            assert [len(shard.pairs) for shard in shards] == [1] * micro_batches
            sizes = [shard.num_pairs for shard in shards]
            assert sum(sizes) == size and max(sizes) - min(sizes) <= 1 and sizes == shard_sizes(size, micro_batches)
            assert [shard.num_local_rows for shard in shards] == [3 * size for size in sizes]
            assert Shard.union(shards) == Shard((size,), 3)


def test_rows_of_a_dummy_sample_reach_nobody() -> None:
    shard = Shard((0,), rows_per_pair=2)
    dummy = {"image": torch.ones(2, 4, requires_grad=True), "pids": torch.tensor([7, 7])}
    gathered = shard.gather(dummy)
    assert gathered["image"].shape == (0, 4) and gathered["pids"].shape == (0,)
    gathered["image"].sum().backward()
    assert dummy["image"].grad is not None and not dummy["image"].grad.any()


def test_rows_are_grouped_by_pair() -> None:
    rows = torch.arange(12).view(2, 6)
    assert Shard((3,), rows_per_pair=2).per_pair(rows).tolist() == rows.view(2, 3, 2).tolist()


def _rows(world: int, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Rows of all processes, of several dtypes and shapes."""
    total = sum(sizes)
    return {
        "image": torch.arange(total * 3, dtype=torch.float64).view(total, 3) / 7,
        "flags": torch.arange(total) % 3 == 0,
        "index": torch.arange(total) + 5,
        "half": torch.arange(total * 2, dtype=torch.float32).view(total, 2, 1),
        "text": torch.arange(total * 3, dtype=torch.float64).view(total, 3) / 11,
    }


def _gathered_rows(pairs: tuple[int, ...], rows_per_pair: int) -> tuple[dict[str, Any], Any, int]:
    shard = Shard(pairs, rows_per_pair)
    sizes = tuple(rows_per_pair * count for count in pairs)
    rows = _rows(len(pairs), sizes)
    local = {name: value[local_slice(sizes)] for name, value in rows.items()}
    local = {
        name: torch.cat([value, value.new_zeros(rows_per_pair, *value.shape[1:])]) for name, value in local.items()
    }
    local["text"].requires_grad_()
    calls = []
    all_gather = torch.distributed.all_gather
    torch.distributed.all_gather = lambda *arguments: calls.append(1) or all_gather(*arguments)  # type: ignore[assignment, func-returns-value]
    found = shard.gather(local)
    found["text"].square().sum().backward()  # type: ignore[no-untyped-call]
    assert local["text"].grad is not None
    return {name: value.detach().numpy() for name, value in found.items()}, local["text"].grad.numpy(), len(calls)


@pytest.mark.parametrize("pairs", [(2, 1), (1, 0), (2, 2, 1)])
def test_all_rows_are_gathered_at_once_with_their_gradient(pairs: tuple[int, ...]) -> None:
    """One collective per dtype; rows behind those of the shard belong to a dummy sample."""
    sizes = tuple(2 * count for count in pairs)
    expected = _rows(len(pairs), sizes)
    for process, (found, gradient, calls) in enumerate(together(len(pairs), _gathered_rows, pairs, 2)):
        assert list(found) == list(expected) and calls == 4  # float64, bool, int64, float32
        for name, value in expected.items():
            assert torch.equal(torch.from_numpy(found[name]), value), name
        first = sum(sizes[:process])
        local = 2 * len(pairs) * expected["text"][first : first + sizes[process]]
        torch.testing.assert_close(torch.from_numpy(gradient)[: sizes[process]], local)
        assert not gradient[sizes[process] :].any()
