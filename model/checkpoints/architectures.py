"""Architectures of a checkpoint by the shapes of its tensors, to suggest the options that fit."""

import re
from collections.abc import Mapping

from torch import Tensor

Sizes = tuple[int, ...]

IMAGE_ARCHS: dict[Sizes, str] = {  # width, patch size, layers
    (768, 32, 12): "vit_base_patch32_clip_quickgelu_224.openai",
    (768, 16, 12): "vit_base_patch16_clip_quickgelu_224.openai",
    (1024, 14, 24): "vit_large_patch14_clip_quickgelu_224.openai",
    (1280, 14, 32): "vit_huge_patch14_clip_224.laion2b",
}
TEXT_ARCHS: dict[Sizes, str] = {  # width, layers
    (512, 12): "openai/clip-vit-base-patch16",
    (768, 12): "openai/clip-vit-large-patch14",
}
PATCHES, WORDS = "encoder.image.trunk.patch_embed.proj.weight", "encoder.text.trunk.embeddings.token_embedding.weight"
PROJECTION = "encoder.image.projection.weight"


def architecture_hint(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """The options that give the architecture of `theirs`, for an error message; empty if it is that of `ours`.

    Args:
        theirs: tensors of the file in our naming.
        ours: tensors of the model.
    """
    kinds, options = [], []
    for tower, sizes_of, archs, words in (
        ("image", _image_sizes, IMAGE_ARCHS, "width {}, patches of {} pixels, {} layers"),
        ("text", _text_sizes, TEXT_ARCHS, "width {}, {} layers"),
    ):
        sizes = sizes_of(theirs)
        if sizes is None or sizes == sizes_of(ours):
            continue
        kinds.append(f"{tower} tower ({words.format(*sizes)})")
        options += [f"model.{tower}.arch={archs[sizes]}"] if sizes in archs else []
    if {PROJECTION} <= theirs.keys() & ours.keys() and len(theirs[PROJECTION]) != len(ours[PROJECTION]):
        kinds.append(f"embedding ({len(theirs[PROJECTION])} dimensions)")
        options.append(f"model.embed_dim={len(theirs[PROJECTION])}")
    if not kinds:
        return ""
    return f"\nthe file has another {' and another '.join(kinds)}" + (f"; set {' '.join(options)}" if options else "")


def _image_sizes(state: Mapping[str, Tensor]) -> Sizes | None:
    patches = state.get(PATCHES)
    if patches is None or patches.ndim != 4:
        return None
    return patches.shape[0], patches.shape[-1], _layers(state, r"^encoder\.image\.trunk\.blocks\.(\d+)\.")


def _text_sizes(state: Mapping[str, Tensor]) -> Sizes | None:
    words = state.get(WORDS)
    if words is None or words.ndim != 2:
        return None
    return words.shape[1], _layers(state, r"^encoder\.text\.trunk\.encoder\.layers\.(\d+)\.")


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.search(pattern, name))})
