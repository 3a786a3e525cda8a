"""CLIP's two towers, built by name: timm's vision transformers and transformers' CLIP text model, and their weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from timm.layers import set_reentrant_ckpt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PretrainedConfig

from configs.schema import CLIP_MEAN, CLIP_STD
from model.checkpoints.files import read_weights, state_dict_of
from utils.checkpoint import load_state
from utils.errors import CheckpointError, ConfigError
from utils.registry import did_you_mean

# Text towers of OpenAI's models, so that they can be built without a network; what is not said is as in B/32.
TEXT_ARCHS: dict[str, dict[str, int]] = {
    "clip": {},
    "openai/clip-vit-base-patch32": {},
    "openai/clip-vit-base-patch16": {},
    "openai/clip-vit-large-patch14": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}

# What timm and transformers raise for `options` that make no model: they are free-form, so anything may be in them.
BAD_OPTIONS = (ValueError, TypeError, AssertionError, RuntimeError, ArithmeticError, LookupError, StrictDataclassError)


@dataclass(frozen=True)
class ImageOptions:
    """The vision tower."""

    arch: str = "vit_base_patch16_clip_quickgelu_224.openai"  # a timm vision transformer, with a class token or a map
    stride: int | None = None  # pixels between patches; null: the patch size; less: overlapping patches
    pretrained: bool | str = True  # start from the weights that timm has under this name, or from this file of timm's
    options: dict[str, Any] = field(default_factory=dict)  # passed on to timm, for instance depth or patch_size
    checkpointing: bool = False  # compute activations again for the gradient instead of keeping them


@dataclass(frozen=True)
class TextOptions:
    """The text tower."""

    arch: str = "openai/clip-vit-base-patch16"  # a CLIP model of the hub, a local folder of one, or `clip`
    pretrained: bool = True  # start from the weights of this name
    options: dict[str, Any] = field(default_factory=dict)  # of transformers' CLIPTextConfig
    checkpointing: bool = False  # compute activations again for the gradient instead of keeping them


def resize_position_grid(
    position_embedding: Tensor, grid: tuple[int, int], prefix: int = 1, *, source: tuple[int, int] | None = None
) -> Tensor:
    """A grid's position embedding (1, prefix + n, W) -> (1, prefix + rows*columns, W).

    The prefix (the class token's row, where there is one) is kept. Bilinear, not antialiased, corners not aligned
    (IRRA model/clip_model.py:resize_pos_embed; spec 1.1).

    Args:
        position_embedding: that of the source grid, row by row.
        grid: rows and columns wanted.
        prefix: positions before the grid.
        source: rows and columns of the source grid; None: it is square.

    Raises:
        ValueError: it is no position embedding, or the source grid is not square and not told.
    """
    if position_embedding.ndim != 3:
        raise ValueError(f"its shape is {tuple(position_embedding.shape)}, not (1, positions, width)")
    rows, columns = grid
    cls, patches = position_embedding[:, :prefix], position_embedding[:, prefix:]
    side = math.isqrt(patches.shape[1])
    if source is None and side * side != patches.shape[1]:
        raise ValueError(
            f"its {patches.shape[1]} positions are no square grid, so their rows and columns cannot be known; "
            "set data.image_size and model.image.stride to what it was trained with"
        )
    image = patches.reshape(1, *(source or (side, side)), -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image.float(), size=(rows, columns), mode="bilinear", align_corners=False)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)


def grid_of(positions: int, image_size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the grid that some stride makes of images of this size, if it has so many positions."""
    for stride in range(1, patch[0] + 1):
        rows, columns = _grid(image_size, patch, stride)
        if rows * columns == positions:
            return rows, columns
    return None


def set_patch_grid(trunk: VisionTransformer, image_size: tuple[int, int], stride: int | None) -> None:
    """Let the patches of `trunk` begin every `stride` pixels (None: the patch size), with fresh positions for them.

    Raises:
        ConfigError: such patches do not fit, or leave gaps.
    """
    patch = trunk.patch_embed.patch_size
    stride = patch[0] if stride is None else stride
    if not 0 < stride <= min(patch) or min(image_size[0] - patch[0], image_size[1] - patch[1]) < 0:
        raise ConfigError(
            f"model.image.stride: {stride} and patches of {patch[0]}x{patch[1]} do not fit images of {image_size}"
        )
    rows, columns = _grid(image_size, patch, stride)
    trunk.patch_embed.proj.stride = (stride, stride)
    trunk.patch_embed.grid_size, trunk.patch_embed.num_patches = (rows, columns), rows * columns
    shape = (1, trunk.num_prefix_tokens + rows * columns, trunk.embed_dim)
    trunk.pos_embed = nn.Parameter(torch.empty(shape).normal_(std=0.02))


def _grid(image_size: tuple[int, int], patch: tuple[int, int], stride: int) -> tuple[int, int]:
    rows, columns = (1 + (size - edge) // stride for size, edge in zip(image_size, patch, strict=True))
    return rows, columns


def build_vit(options: ImageOptions, **facts: Any) -> VisionTransformer:
    """A fresh timm model; `facts` are what the framework decides (size, number of outputs)."""
    name = options.arch.split(".")[0]
    if not timm.is_model(name):
        raise ConfigError(f"model.image.arch: {did_you_mean(name, timm.list_models('vit_*'))}; timm has no '{name}'")
    try:
        model = timm.create_model(options.arch, pretrained=False, **facts, **options.options)
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.image.options: timm cannot build {options.arch} with them: {reason(error)}") from None
    if (
        not isinstance(model, VisionTransformer)
        or model.pos_embed is None
        or (model.global_pool, model.num_prefix_tokens) not in (("token", 1), ("map", 0))
    ):
        raise ConfigError(
            f"model.image.arch: {options.arch} is no vision transformer with one class token or a pooling map"
        )
    if options.checkpointing:
        set_reentrant_ckpt(False)  # the kind that works with frozen layers, too
        model.set_grad_checkpointing()
    return model


def load_vit(trunk: VisionTransformer, options: ImageOptions, *, own_part: str | None = None) -> tuple[str, ...]:
    """Put pretrained weights into `trunk`, and its head where it has one; returns what there is to say about it.

    Args:
        own_part: stands in the names of what a plain vision transformer does not have, and is left as it is.
    """
    notes = []
    if isinstance(options.pretrained, str):
        state, source = state_dict_of(read_weights(options.pretrained), options.pretrained), options.pretrained
    else:
        state, source = _pretrained_vit(options).state_dict(), options.arch
    own = trunk.state_dict()
    if "head.weight" not in own:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    elif "head.weight" not in state or state["head.weight"].shape != own["head.weight"].shape:
        notes.append(
            f"model.image: {source} has no projection to {len(own['head.weight'])} dimensions (model.embed_dim); "
            "it starts fresh"
        )
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
    else:
        state.setdefault("head.bias", own["head.bias"])  # not used: CLIP's projection has none
    if own_part is not None:
        state |= {name: value for name, value in own.items() if own_part in name}
    if "pos_embed" in state and state["pos_embed"].shape != trunk.pos_embed.shape:
        grid = trunk.patch_embed.grid_size
        try:
            state["pos_embed"] = resize_position_grid(state["pos_embed"], grid, trunk.num_prefix_tokens)
        except ValueError as error:
            raise CheckpointError(f"{source}: pos_embed cannot be resized to this image size: {error}") from None
    load_state(trunk, state, source)
    mean, std = (tuple(trunk.pretrained_cfg[key]) for key in ("mean", "std"))
    if (mean, std) != (CLIP_MEAN, CLIP_STD):
        notes.append(
            f"model.image: {options.arch} was trained on images normalised by mean {list(mean)} and std {list(std)}: "
            "data.image_mean and data.image_std"
        )
    return tuple(notes)


def _pretrained_vit(options: ImageOptions) -> VisionTransformer:
    """A timm model with the weights of its name, and with the head that belongs to them."""
    try:
        return timm.create_model(options.arch, pretrained=True, **options.options)
    except (OSError, RuntimeError, ValueError) as error:
        raise no_weights("image", options.arch, error) from None


def known_options(config: PretrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a text model with their defaults; raises `ConfigError` for one that it does not have."""
    known: dict[str, Any] = config.to_dict()
    for name in options:
        if name not in known:
            raise ConfigError(f"model.text.options.{name}: unknown key; {did_you_mean(name, known)}")
    return known


def build_text_model(embed_dim: int, options: TextOptions) -> CLIPTextModelWithProjection:
    known = known_options(CLIPTextConfig(), options.options)
    if options.pretrained:
        return _pretrained_text_model(options)
    if options.arch not in TEXT_ARCHS:
        return CLIPTextModelWithProjection(_config_of(options))
    sizes = {**TEXT_ARCHS[options.arch], **options.options}
    try:
        vocab_size = sizes.get("vocab_size", known["vocab_size"])
        special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}  # where CLIP's vocabulary ends too
        return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=embed_dim, **{**special, **sizes}))
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build the text tower: {reason(error)}") from None


def _config_of(options: TextOptions) -> CLIPTextConfig:
    """The sizes of a model that is not among `TEXT_ARCHS`, from its folder or the hub."""
    try:
        return CLIPTextConfig.from_pretrained(options.arch, **options.options)
    except OSError:
        raise ConfigError(
            f"model.text.arch: unknown '{options.arch}' (no folder of this name, and not in the hub's cache); "
            f"{did_you_mean(options.arch, TEXT_ARCHS)}"
        ) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text: {options.arch} cannot be built with these options: {reason(error)}") from None


def _pretrained_text_model(options: TextOptions) -> CLIPTextModelWithProjection:
    try:
        return CLIPTextModelWithProjection.from_pretrained(options.arch, **options.options)
    except OSError as error:
        raise no_weights("text", options.arch, error) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text: {options.arch} cannot be loaded with these options: {reason(error)}") from None


def no_weights(tower: str, arch: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.{tower}.arch: the weights of {arch} are not in the hub's cache and cannot be had from the hub "
        f"({reason(error)}); init.path=FILE starts from a local checkpoint, such as OpenAI's ViT-B-16.pt, "
        f"model.{tower}.pretrained=false from random weights"
    )


def reason(error: Exception) -> str:
    """The last line of a library's message, which names the cause where there are several."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
