"""Transformer MLPs that recompute their activation in the backward pass, which halves what they keep."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Activation by timm's name: the function, and the gradient of its input from that of its output.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "quick_gelu": (
        lambda x: x * torch.sigmoid(1.702 * x),  # = silu(1.702 x) / 1.702, whose derivative is that of silu
        lambda gradient, x: torch.ops.aten.silu_backward(gradient, 1.702 * x),
    ),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"),
    ),
}
NAMES = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}


def activation_name(activation: nn.Module) -> str:
    """Name of an activation module in timm: gelu, quick_gelu, gelu_tanh, ..."""
    if getattr(activation, "approximate", "none") == "tanh":
        return "gelu_tanh"
    name = type(activation).__name__
    return NAMES.get(name, name.lower())


class LeanMLP(nn.Module):
    """Linear layer, activation, linear layer; only the inputs of the three are kept for the backward pass.

    PyTorch also keeps the output of the activation and its intermediate values. With QuickGELU, these are three tensors
    of four times the width of the tokens in place of one.

    Args:
        fc1: first layer.
        act: activation, one of `ACTIVATIONS`.
        fc2: second layer.
    """

    def __init__(self, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2
        self.activation = activation_name(act)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) -> (..., D)."""
        hidden = self.fc1(tokens)
        weight, bias = self.fc2.weight.to(hidden.dtype), self.fc2.bias.to(hidden.dtype)  # as autocast does
        out: Tensor = _ActivatedLinear.apply(hidden, weight, bias, self.activation)
        return out


class _ActivatedLinear(torch.autograd.Function):
    """`linear(activation(hidden))`, which keeps `hidden` alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.activation = activation
        return F.linear(ACTIVATIONS[activation][0](hidden), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        forward, backward = ACTIVATIONS[ctx.activation]
        rows = gradient.flatten(0, -2)
        into_hidden = backward((rows @ weight).view_as(hidden), hidden)
        into_weight = rows.t() @ forward(hidden).flatten(0, -2) if ctx.needs_input_grad[1] else None
        into_bias = rows.sum(dim=0) if ctx.needs_input_grad[2] else None
        return into_hidden, into_weight, into_bias, None


def lean_mlps(model: nn.Module) -> None:
    """Replace the MLPs of timm's and transformers' blocks inside `model` by `LeanMLP`; names of parameters stay.

    MLPs with dropout, norms, without biases, or with other activations are left as they are.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if lean := _lean(child):
                setattr(module, name, lean)


def _lean(mlp: nn.Module) -> LeanMLP | None:
    layers = dict(mlp.named_children())
    fc1, fc2 = layers.pop("fc1", None), layers.pop("fc2", None)
    act = layers.pop("act", None) or layers.pop("activation_fn", None)
    dropout = any(not isinstance(one, nn.Identity | nn.Dropout) or getattr(one, "p", 0) for one in layers.values())
    if not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)) or act is None or dropout:
        return None
    known = activation_name(act) in ACTIVATIONS and fc2.bias is not None
    return LeanMLP(fc1, act, fc2) if known else None
