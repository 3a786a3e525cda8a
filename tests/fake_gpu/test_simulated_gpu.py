"""The simulated GPU computes as a CPU does, and names the operator and the line of a planted fault."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.objectives.base import Metadata, Step
from model.objectives.matching import SDM
from tests.helpers.simulated_gpu import GPU, GpuTensor, HostSyncError, WrongDeviceError, simulated_gpu

X = torch.arange(12, dtype=torch.float32).view(3, 4)


def copy_from_pageable_memory(x: Tensor) -> None:
    torch.ones(3).to(GPU, non_blocking=True)


def write_at_a_mask(x: Tensor) -> None:
    x[x > 3] = torch.zeros(8, device=GPU)


WAITING: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x[0, 0].item(), "aten._local_scalar_dense (.item(), bool(), int() or float() of a tensor)"),
    "bool": (lambda x: bool(x.sum() > 1), "aten._local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "aten._to_copy to the CPU"),
    "cpu": (lambda x: x.cpu(), "aten._to_copy to the CPU"),
    "tensor": (lambda x: torch.tensor([1.0], device=GPU), "aten._to_copy to the GPU, blocking"),
    "pageable": (copy_from_pageable_memory, "aten._to_copy to the GPU, from memory that is not pinned"),
    "nonzero": (lambda x: x.nonzero(), "aten.nonzero"),
    "bincount": (lambda x: x[0].long().bincount(minlength=3), "aten.bincount"),
    "mask": (lambda x: x[x > 3], "aten.index with a boolean index"),
    "write": (write_at_a_mask, "aten.index_put_ with a boolean index"),
    "index": (lambda x: x[torch.tensor([0, 2])], "aten.index with an index on the CPU"),
    "repeat": (lambda x: x.repeat_interleave(x[:, 0].long(), 0), "aten.repeat_interleave"),
}


@pytest.mark.parametrize("name", WAITING)
def test_host_synchronisations_are_named(name: str) -> None:
    function, operator = WAITING[name]
    with simulated_gpu() as gpu:
        x = X.to(GPU)
        with gpu.no_syncs(), pytest.raises(HostSyncError) as caught:
            function(x)
    message = str(caught.value)
    assert message.startswith("tests/fake_gpu/test_simulated_gpu.py:") and operator in message


FREE: dict[str, Callable[[Tensor], object]] = {
    "pinned": lambda x: torch.ones(3).pin_memory().to(GPU, non_blocking=True),
    "where": lambda x: torch.where(x > 3, x, 0.0),
    "fill": lambda x: x.masked_fill_(x > 3, 1.0),
    "index": lambda x: x[torch.arange(2, device=GPU)],
    "write": lambda x: x[:, 1:].copy_(x[:, :-1]),
    "scalar": lambda x: x * torch.tensor(2.0),
}


@pytest.mark.parametrize("name", FREE)
def test_other_operators_do_not_synchronise(name: str) -> None:
    with simulated_gpu() as gpu:
        x = X.to(GPU)
        with gpu.no_syncs():
            FREE[name](x)


@pytest.mark.parametrize(
    ("fault", "error", "operator"),
    [
        (lambda losses: losses * losses.mean().item(), HostSyncError, "aten._local_scalar_dense"),
        (lambda losses: losses[losses > 0], HostSyncError, "aten.index with a boolean index"),
        (
            lambda losses: losses + torch.ones(3),
            WrongDeviceError,
            "aten.add takes tensors of the GPU and of the CPU, (3,)",
        ),
    ],
    ids=["item", "mask", "device"],
)
def test_a_fault_in_a_loss_is_named(
    fault: Callable[[Tensor], Tensor], error: type[Exception], operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_pair = SDM.per_pair
    monkeypatch.setattr(SDM, "per_pair", lambda *args: fault(per_pair(*args)))
    with simulated_gpu() as gpu:
        image, text, pids = (values.to(GPU) for values in (X, X.flip(0), torch.arange(3)))
        with gpu.no_syncs(), pytest.raises(error) as caught:
            SDM(Metadata(3, 4, 9))(Step.from_embeddings(image, text, pids))
    message = str(caught.value)
    assert "in <lambda> (" in message and "lambda losses: losses" in message and operator in message


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, power):
        ctx.save_for_backward(x)
        return x**power

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient, None


def loss_of(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """A loss with a custom function, a checkpoint, a broadcast, an in-place operator and two uses of a tensor."""
    hidden = checkpoint(layer, x, use_reentrant=False)
    hidden = Cube.apply(hidden, 3) + hidden[:, :1]
    changed = hidden.clone()
    changed[:, 1:] += layer.bias[1:]
    return (changed * hidden).exp().mean()


def test_values_and_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    expected = loss_of(layer, x)
    expected.backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    with simulated_gpu():
        layer.to(GPU)
        loss = loss_of(layer, x.to(GPU))
        loss.backward()
        assert isinstance(loss, GpuTensor) and loss.is_cuda
        assert torch.equal(loss.value, expected)
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad.cpu(), gradient)
