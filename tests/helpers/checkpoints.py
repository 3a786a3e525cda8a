"""Weight files as other projects write them: CLIP in every container, published checkpoints, timm and BERT files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from configs.schema import load_config
from model.build import build_task
from model.task import RetrievalTask
from tests.helpers.configs import ARCH, ROOT

# Size of the reference CLIP, and overrides that give ours the same size.
VISION = {"width": 128, "layers": 2, "patch_size": 16, "head_width": 64}
TEXT = {"width": 128, "layers": 2, "heads": 2, "context_length": 77, "vocab_size": 600}
OVERRIDES = [
    "model.embed_dim=96",
    f"model.image={{arch: {ARCH}, pretrained: false, options: {{embed_dim: 128, depth: 2, num_heads: 2}}}}",
    "model.text={arch: clip, pretrained: false, options: {vocab_size: 600, hidden_size: 128, num_hidden_layers: 2, "
    "num_attention_heads: 2, intermediate_size: 512}}",
]


def their_clip(size: tuple[int, int]) -> open_clip.CLIP:
    """CLIP of open_clip with random weights."""
    torch.manual_seed(0)
    model = open_clip.CLIP(96, {**VISION, "image_size": size}, TEXT, quick_gelu=True)
    for parameter in model.parameters():  # open_clip initialises some with zeros or ones
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def our_clip(*overrides: str) -> RetrievalTask:
    """Task with our CLIP encoder of the same size."""
    return build_task(load_config(ROOT / "configs/baseline.yaml", [*OVERRIDES, *overrides]), None)


class Bomb:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


class Archived(nn.Module):
    """Module tree with the names of a state dict, like OpenAI's archive."""

    def forward(self) -> int:
        return 0


def save_torchscript(state: dict[str, Tensor], path: Path) -> None:
    """Save as a TorchScript archive, as OpenAI does."""
    root = Archived()
    for name, value in state.items():
        *folders, leaf = name.split(".")
        module: nn.Module = root
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, Archived())
            module = getattr(module, folder)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
    for name in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(name, torch.tensor(77))
    torch.jit.script(root).save(str(path))


def save_plain(state: dict[str, Tensor], path: Path) -> None:
    """Save as a plain state dict."""
    torch.save(state, path)


def save_wrapped(state: dict[str, Tensor], path: Path) -> None:
    """Save as a checkpoint of DataParallel with a `state_dict`."""
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": wrapped}, path)


def save_legacy(state: dict[str, Tensor], path: Path) -> None:
    """Save as a checkpoint in torch's format before 1.6."""
    torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Save as safetensors."""
    save_file(state, path)


CONTAINERS: dict[str, tuple[Callable[[dict[str, Tensor], Path], None], str]] = {
    "TorchScript archive": (save_torchscript, "ViT-B-16.pt"),
    "state dict": (save_plain, "clip.pt"),
    "state dict of DataParallel in a checkpoint": (save_wrapped, "clip.pth"),
    "legacy file": (save_legacy, "clip.pth"),
    "safetensors": (save_safetensors, "open_clip_model.safetensors"),
}


def encoder_only(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the heads."""
    return {name: value for name, value in weights.items() if name.startswith("base_model.")}


def with_module(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the prefix of DistributedDataParallel."""
    return {f"module.{name}": value for name, value in weights.items()}


def fmfa_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of FMFA's HEAD commit, whose classifier has a row per training caption."""
    classifier = {"classifier.weight": torch.zeros(99, weights["classifier.weight"].shape[1])}
    return with_module(weights | classifier | {"classifier.bias": torch.zeros(99)})


def rde_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """IRRA's encoder with two token selection layers, under RDE's names."""
    layers = {}
    for layer in ("visul_emb_layer", "texual_emb_layer"):
        sizes = {"linear": (48, 64), "fc": (48, 64), "mlp.layers.0": (24, 64), "mlp.layers.1": (48, 24)}
        for name, (rows, columns) in sizes.items():
            if (layer, name) != ("texual_emb_layer", "fc"):
                layers |= {
                    f"{layer}.{name}.weight": torch.randn(rows, columns),
                    f"{layer}.{name}.bias": torch.randn(rows),
                }
        for name, size in {"mlp.bns.0": 24, "mlp.bns.1": 48}.items():
            for part in ("weight", "bias", "running_mean", "running_var"):
                layers[f"{layer}.{name}.{part}"] = torch.rand(size)
            layers[f"{layer}.{name}.num_batches_tracked"] = torch.tensor(7)
    return encoder_only(weights) | layers


def saved_vit(folder: Path, arch: str = ARCH, **options: object) -> tuple[Path, torch.nn.Module]:
    """File with a timm vision tower of TINY's size and random weights, and the tower itself."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 16}
    source = timm.create_model(arch, **sizes, **options).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(source.state_dict(), folder / "vit.pth")
    return folder / "vit.pth", source


BERT = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}


def ivt_sources(folder: Path, **bert: int) -> tuple[nn.Module, BertModel, list[str]]:
    """Random timm vision transformer and BERT, saved in their libraries' formats, and overrides that select them."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", embed_dim=64, depth=2, num_heads=2)
    words = BertModel(BertConfig(**{**BERT, **bert}), add_pooling_layer=False)
    for parameter in (*vit.parameters(), *words.parameters()):
        nn.init.normal_(parameter)
    torch.save(vit.state_dict(), folder / "vit.pth")
    words.save_pretrained(folder / "bert")
    image = f"{{arch: vit_base_patch16_224, stride: 12, pretrained: {folder}/vit.pth"
    return (
        vit,
        words,
        [
            "data.image_size=[64, 32]",
            f"model.image={image}, options: {{embed_dim: 64, depth: 2, num_heads: 2}}}}",
            f"model.text={{arch: {folder}/bert, pretrained: true}}",
        ],
    )
