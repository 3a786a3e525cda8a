"""Architectures by shapes: the options of a checkpoint that fits another model are suggested."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from model.checkpoints.architectures import IMAGE_ARCHS, PATCHES, PROJECTION, WORDS, architecture_hint
from model.checkpoints.architectures import TEXT_ARCHS as TEXTS
from model.encoders.towers import TEXT_ARCHS
from model.load import load_weights
from tests.helpers.checkpoints import our_clip, save_plain, their_clip
from utils.errors import CheckpointError

BASE, LARGE = (768, 16, 12, 512, 12, 512), (1024, 14, 24, 768, 12, 768)


def clip_of(width: int, patch: int, depth: int, text: int, layers: int, dim: int) -> dict[str, Tensor]:
    """Tensors of these sizes, without memory."""
    shapes: dict[str, tuple[int, ...]] = {PATCHES: (width, 3, patch, patch), WORDS: (49408, text)}
    shapes |= {PROJECTION: (dim, width)}
    shapes |= {f"encoder.image.trunk.blocks.{layer}.norm1.bias": (width,) for layer in range(depth)}
    shapes |= {f"encoder.text.trunk.encoder.layers.{layer}.layer_norm1.bias": (text,) for layer in range(layers)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


HINTS: dict[str, tuple[Any, list[str]]] = {
    "large": (
        LARGE,
        [
            "model.image.arch=vit_large_patch14_clip_quickgelu_224.openai",
            "model.text.arch=openai/clip-vit-large-patch14",
            "model.embed_dim=768",
        ],
    ),
    "other patches": ((768, 32, *BASE[2:]), ["model.image.arch=vit_base_patch32_clip_quickgelu_224.openai"]),
    "other dimension": ((*BASE[:5], 256), ["model.embed_dim=256"]),
    "of no name": ((640, *BASE[1:]), []),
}


@pytest.mark.parametrize("case", HINTS)
def test_another_architecture_is_suggested_by_its_options(case: str) -> None:
    sizes, options = HINTS[case]
    hint = architecture_hint(clip_of(*sizes), clip_of(*BASE))
    assert hint.startswith("\nthe file has another ") and (hint.partition("; set ")[2].split() == options)


def test_the_same_architecture_and_other_encoders_have_no_hint() -> None:
    assert architecture_hint(clip_of(*BASE), clip_of(*BASE)) == architecture_hint({}, clip_of(*BASE)) == ""


@pytest.mark.parametrize("arch", [name for name in IMAGE_ARCHS.values() if "huge" not in name])
def test_suggested_names_have_these_sizes(arch: str) -> None:
    with torch.device("meta"):
        tower = timm.create_model(arch, pretrained=False)
    assert IMAGE_ARCHS[tower.embed_dim, tower.patch_embed.patch_size[0], len(tower.blocks)] == arch
    assert set(TEXTS.values()) <= TEXT_ARCHS.keys()


def test_the_error_for_a_checkpoint_of_another_size_suggests_its_options(tmp_path: Path) -> None:
    save_plain(their_clip((224, 224)).state_dict(), tmp_path / "clip.pt")
    task = our_clip("model.embed_dim=48", "model.image.options.depth=3")
    with pytest.raises(CheckpointError, match=r"width 128, patches of 16 pixels, 2 layers.*set model\.embed_dim=96"):
        load_weights(task, tmp_path / "clip.pt")
