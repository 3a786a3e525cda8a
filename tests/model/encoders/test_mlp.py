"""MLPs that recompute their activation: the same numbers, fewer tensors kept."""

import copy

import pytest
import torch
from timm.layers import GELUTanh, Mlp, QuickGELU
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from configs.schema import load_config
from model.build import build_task
from model.encoders.mlp import LeanMLP, lean_mlps
from model.task import RetrievalTask
from tests.helpers.configs import ROOT


def both(act: type[nn.Module] = QuickGELU) -> tuple[nn.Module, nn.Module]:
    """timm's MLP inside a model, and the same with the MLP replaced."""
    torch.manual_seed(0)
    plain = nn.Sequential(Mlp(8, 32, act_layer=act)).double()
    lean = copy.deepcopy(plain)
    lean_mlps(lean)
    assert isinstance(lean[0], LeanMLP)
    return plain, lean


def gradients(model: nn.Module, tokens: Tensor, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    tokens = tokens.clone().requires_grad_()
    out = model(tokens)
    parameters = [one for one in model.parameters() if one.requires_grad]
    return out, list(torch.autograd.grad(out, [tokens, *parameters], upstream))


@pytest.mark.parametrize("act", [QuickGELU, nn.GELU, GELUTanh])
def test_output_and_gradients_equal_those_of_the_plain_mlp(act: type[nn.Module]) -> None:
    plain, lean = both(act)
    assert list(plain.state_dict()) == list(lean.state_dict())
    tokens, upstream = torch.randn(2, 3, 5, 8, dtype=torch.float64).unbind()
    (one, expected), (other, found) = (gradients(model, tokens, upstream) for model in (plain, lean))
    assert torch.equal(one, other)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_frozen_layers_get_no_gradient() -> None:
    plain, lean = both()
    tokens, upstream = torch.randn(2, 3, 5, 8, dtype=torch.float64).unbind()
    for model in (plain, lean):
        model[0].fc2.requires_grad_(False)  # type: ignore[operator,union-attr,index]
    (_, expected), (_, found) = (gradients(model, tokens, upstream) for model in (plain, lean))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_one_wide_tensor_is_kept_in_place_of_three(precision: torch.dtype | None) -> None:
    def wide(model: nn.Module) -> int:
        kept: dict[int, Tensor] = {}
        keep = saved_tensors_hooks(lambda one: kept.setdefault(one.data_ptr(), one), lambda one: one)
        with keep, torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            model(torch.randn(50, 8)).sum()
        return sum(one.shape == (50, 32) for one in kept.values())

    plain, lean = (model.float() for model in both())
    assert (wide(plain), wide(lean)) == (3, 1)


def test_autocast_computes_in_its_precision_and_gives_gradients_in_float32() -> None:
    plain, lean = (model.float() for model in both())
    tokens, upstream = torch.randn(5, 8), torch.randn(5, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (one, expected), (other, found) = (gradients(model, tokens, upstream) for model in (plain, lean))
    assert torch.equal(one, other) and other.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # bf16 has 8 bits


def test_transformers_mlp_is_replaced_and_others_stay() -> None:
    model = nn.ModuleDict(
        {
            "clip": CLIPMLP(CLIPTextConfig(hidden_size=8, intermediate_size=16)),
            "dropout": Mlp(8, 16, drop=0.1),
            "norm": Mlp(8, 16, norm_layer=nn.LayerNorm),
            "unknown": Mlp(8, 16, act_layer=nn.Tanh),
            "no_bias": Mlp(8, 16, bias=False),
        }
    )
    lean_mlps(model)
    assert [name for name, one in model.items() if isinstance(one, LeanMLP)] == ["clip"]


@pytest.mark.parametrize("config", ["irra", "ivt", "lcr2s", "rde"])
def test_every_encoder_and_loss_has_lean_mlps(config: str) -> None:
    mlps = [one for one in meta_task(config).modules() if hasattr(one, "fc1")]
    assert mlps and all(isinstance(one, LeanMLP) for one in mlps)


def meta_task(name: str) -> RetrievalTask:
    """Task of a shipped config without memory for its weights."""
    with torch.device("meta"):
        return build_task(load_config(ROOT / f"configs/{name}.yaml"), 5, weights=False, teacher=False)
