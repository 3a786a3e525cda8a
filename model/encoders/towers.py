"""CLIP's two towers, built by name: timm's vision transformers and transformers' CLIP text model, and their weights."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from timm.layers import set_reentrant_ckpt
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PretrainedConfig

from configs.schema import CLIP_MEAN, CLIP_STD
from model.checkpoints.facts import Facts
from model.checkpoints.files import read_weights, state_dict_of
from model.checkpoints.grids import PatchGrid, fit_positions, patch_grid
from model.checkpoints.grids import resize_position_grid as resize_position_grid
from model.encoders.library_options import check_library_options
from model.encoders.mlp import activation_name, lean_mlps
from model.encoders.published import image_weights, no_weights, reason, text_config, text_weights
from utils.checkpoint import load_state
from utils.errors import CheckpointError, ConfigError
from utils.hub import fetch
from utils.options import Option, option
from utils.registry import did_you_mean

T = TypeVar("T")

# Text towers of OpenAI's models, built without a network. Sizes that are not listed are those of B/32.
TEXT_ARCHS: dict[str, dict[str, int]] = {
    "clip": {},
    "openai/clip-vit-base-patch32": {},
    "openai/clip-vit-base-patch16": {},
    "openai/clip-vit-large-patch14": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}

# Errors of timm and transformers for free-form `options` that make no model.
BAD_OPTIONS = (
    ValueError, TypeError, AttributeError, AssertionError, RuntimeError, ArithmeticError, LookupError,
    StrictDataclassError,
)  # fmt: skip
# Arguments of the model, unlike those of timm.create_model, name no file and no hub.
VIT_OPTIONS = {name: one.default for name, one in inspect.signature(VisionTransformer).parameters.items()}
NO_CODE = {"trust_remote_code": False}  # without it, transformers asks on the terminal whether to run a folder's code
RESNETS = re.compile(r"(?i)(modified)?(rn\d|resnet|resnext|wide_resnet)")  # OpenAI's names and timm's
VISION_TRANSFORMERS = ("vision_transformer", "vision_transformer_hybrid", "deit")  # modules of timm
Temperature = Annotated[float, Option(gt=0)]
CHECKPOINTING = "recompute activations in the backward pass instead of keeping them"


@dataclass(frozen=True)
class ImageOptions:
    """Vision tower."""

    arch: str = option("vit_base_patch16_clip_quickgelu_224.openai", help="timm vision transformer")
    stride: int | None = option(
        None, ge=1, help="pixels between patches; null: the patch size; less: overlapping patches"
    )
    pretrained: bool | str = option(
        True, path=True, help="load timm's weights of this name, or those of a file in timm's format"
    )
    options: dict[str, Any] = option({}, help="arguments for timm, for instance depth or patch_size")
    checkpointing: bool = option(False, help=CHECKPOINTING, resumable=True)


@dataclass(frozen=True)
class TextOptions:
    """Text tower."""

    arch: str = option(
        "openai/clip-vit-base-patch16", path=True, help="CLIP model of the hub, a local folder of one, or clip"
    )
    pretrained: bool = option(True, help="load the weights of this name")
    options: dict[str, Any] = option({}, help="arguments for transformers' CLIPTextConfig")
    checkpointing: bool = option(False, help=CHECKPOINTING, resumable=True)


def set_patch_grid(trunk: VisionTransformer, image_size: tuple[int, int], stride: int | None) -> None:
    """Set the stride of the patches, and initialise the positions of the new grid.

    Args:
        trunk: timm model to change.
        image_size: height and width in pixels.
        stride: pixels between patches; None is the patch size.

    Raises:
        ConfigError: the patches do not fit the image, or leave gaps.
    """
    patch = trunk.patch_embed.patch_size
    stride = patch[0] if stride is None else stride
    if not 0 < stride <= min(patch) or min(image_size[0] - patch[0], image_size[1] - patch[1]) < 0:
        raise ConfigError(
            f"model.image.stride: must be from 1 to {min(patch)} for patches of {patch[0]}x{patch[1]} in images of "
            f"{image_size[0]}x{image_size[1]}, got {stride}"
        )
    rows, columns = patch_grid(image_size, patch, stride)
    trunk.patch_embed.proj.stride = (stride, stride)
    trunk.patch_embed.grid_size, trunk.patch_embed.num_patches = (rows, columns), rows * columns
    shape = (1, trunk.num_prefix_tokens + rows * columns, trunk.embed_dim)
    trunk.pos_embed = nn.Parameter(torch.empty(shape).normal_(std=0.02))


def build_vit(options: ImageOptions, **settings: Any) -> VisionTransformer:
    """A randomly initialised timm model; `settings` are the arguments decided by the framework."""
    name = options.arch.split(".")[0]
    if RESNETS.match(name):
        raise ConfigError(
            f"model.image.arch: ResNet towers are not supported, got {options.arch}; use a vision transformer, such as "
            f"{ImageOptions.arch}"
        )
    if not timm.is_model(name):
        raise ConfigError(
            f"model.image.arch: unknown timm model '{name}'; {did_you_mean(name, timm.list_models('vit_*'))}"
        )
    files = " (model.image.pretrained=FILE takes a file of weights)"
    check_library_options(options.options, VIT_OPTIONS, "model.image.options", files)
    try:
        model = timm.create_model(options.arch, pretrained=False, **settings, **options.options)
    except BAD_OPTIONS as error:
        if timm.model_entrypoint(name).__module__.rpartition(".")[2] in VISION_TRANSFORMERS:
            raise ConfigError(f"model.image.options: timm cannot build {options.arch} ({reason(error)})") from None
        model = None  # of another kind, which lacks arguments of vision transformers
    if (
        not isinstance(model, VisionTransformer)
        or model.pos_embed is None
        or (model.global_pool, model.num_prefix_tokens) not in (("token", 1), ("map", 0))
    ):
        raise ConfigError(
            f"model.image.arch: must be a vision transformer with one class token or a pooling map, got {options.arch}"
        )
    if options.checkpointing:
        set_reentrant_ckpt(False)  # the reentrant kind fails with frozen layers
        model.set_grad_checkpointing()
    lean_mlps(model)
    return model


def load_vit(
    trunk: VisionTransformer, options: ImageOptions, image_size: tuple[int, int], *, keep: str | None = None
) -> tuple[str, ...]:
    """Load pretrained weights into `trunk` and its head, if it has one; returns remarks for the log.

    Args:
        trunk: timm model to load into.
        options: options of the vision tower.
        image_size: height and width in pixels.
        keep: substring of the names of tensors that plain vision transformers lack; they keep their values.
    """
    notes = []
    if isinstance(options.pretrained, str):
        state, source = state_dict_of(read_weights(options.pretrained), options.pretrained), options.pretrained
    else:
        state, source = _pretrained_vit(options).state_dict(), options.arch
    current = trunk.state_dict()
    if "head.weight" not in current:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    elif "head.weight" not in state or state["head.weight"].shape != current["head.weight"].shape:
        notes.append(
            f"model.image: {source} has no projection to {len(current['head.weight'])} dimensions (model.embed_dim), "
            "so it is initialised afresh"
        )
        state |= {name: current[name] for name in ("head.weight", "head.bias")}
    else:
        state.setdefault("head.bias", current["head.bias"])  # unused: CLIP's projection has no bias
    if keep is not None:
        state |= {name: value for name, value in current.items() if keep in name}
    if "pos_embed" in state:
        facts = Facts(options.arch, tuple(trunk.pretrained_cfg["input_size"][1:]), square=True)
        try:
            state["pos_embed"], remark = fit_positions(state["pos_embed"], patches_of(trunk, image_size), facts)
        except ValueError as error:
            raise CheckpointError(
                f"{source}: pos_embed cannot be resized to this image size: {error}; set data.image_size and "
                "model.image.stride to those of its training"
            ) from None
        notes += [f"model.image: position grid of {source}: {remark}"] if remark else []
    _check_activation(trunk, options)
    load_state(trunk, state, source)
    mean, std = (tuple(trunk.pretrained_cfg[key]) for key in ("mean", "std"))
    if (mean, std) != (CLIP_MEAN, CLIP_STD):
        notes.append(
            f"model.image: {options.arch} was trained with other normalisation; set data.image_mean={list(mean)} "
            f"data.image_std={list(std)}"
        )
    return tuple(notes)


def patches_of(trunk: VisionTransformer, image_size: tuple[int, int]) -> PatchGrid:
    """The patches of a vision tower for images of this size."""
    patch_embed = trunk.patch_embed
    return PatchGrid(patch_embed.grid_size, image_size, patch_embed.patch_size, trunk.num_prefix_tokens)


def activation_of(trunk: VisionTransformer) -> str:
    """The activation of a vision tower by its name in timm: gelu, quick_gelu, gelu_tanh, ..."""
    return activation_name(trunk.blocks[0].mlp.act)


def _check_activation(trunk: VisionTransformer, options: ImageOptions) -> None:
    """Raise `ConfigError` if timm lists the weights of this name for QuickGELU, and the tower has another one.

    For some of them it also lists a tower with GELU, whose features differ.
    """
    name, _, tag = options.arch.partition(".")
    twin = f"{name.replace('_clip_', '_clip_quickgelu_')}.{tag}"
    if options.pretrained is not True or not tag or twin == options.arch or not timm.models.is_model_pretrained(twin):
        return
    if activation_of(trunk) != "quick_gelu":
        raise ConfigError(
            f"model.image.arch: the weights {options.arch} were trained with QuickGELU, got {activation_of(trunk)}; "
            f"set model.image.arch={twin}"
        )


def _pretrained_vit(options: ImageOptions) -> VisionTransformer:
    """A timm model with the weights of its name and their head."""
    load, published = (
        partial(timm.create_model, options.arch, pretrained=True, **options.options),
        image_weights(options.arch),
    )
    try:
        model: VisionTransformer = fetch(published, load) if published else load()
        return model
    except (OSError, RuntimeError, ValueError) as error:
        raise no_weights("image", options.arch, error) from None


def known_options(config: PretrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a text model with their defaults; raises as `check_library_options`."""
    known: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    check_library_options(options, known, "model.text.options")
    return known


def build_text_model(embed_dim: int, options: TextOptions) -> CLIPTextModelWithProjection:
    """CLIP's text tower, with pretrained or random weights."""
    known = known_options(CLIPTextConfig(), options.options)
    if options.pretrained:
        return pretrained_text(CLIPTextModelWithProjection.from_pretrained, options.arch, options.options)
    if options.arch not in TEXT_ARCHS:
        return CLIPTextModelWithProjection(_config_of(options))
    sizes = {**TEXT_ARCHS[options.arch], **options.options}
    try:
        vocab_size = sizes.get("vocab_size", known["vocab_size"])
        special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}  # as in CLIP's vocabulary
        return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=embed_dim, **{**special, **sizes}))
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build the text tower ({reason(error)})") from None


def _config_of(options: TextOptions) -> CLIPTextConfig:
    """Sizes of a model outside `TEXT_ARCHS`, from its folder or the hub."""
    try:
        load = partial(CLIPTextConfig.from_pretrained, options.arch, **NO_CODE, **options.options)
        return fetch(text_config(options.arch), load)
    except OSError:
        raise ConfigError(
            f"model.text.arch: unknown '{options.arch}', neither a folder nor in the hub's cache; "
            f"{did_you_mean(options.arch, TEXT_ARCHS)}"
        ) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build {options.arch} ({reason(error)})") from None


def pretrained_text(load: Callable[..., T], arch: str, options: Mapping[str, Any]) -> T:
    """The result of `load`, transformers' `from_pretrained` of a text model, with its errors in plain words."""
    try:
        return fetch(text_weights(arch), partial(load, arch, weights_only=True, **NO_CODE, **options))
    except OSError as error:
        raise no_weights("text", arch, error) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot load {arch} ({reason(error)})") from None
    except Exception as error:  # the readers of its file formats raise errors of many types
        raise CheckpointError(
            f"model.text.arch: the weights of {arch} are damaged, or a pickle that would run code "
            f"({type(error).__name__}); save them as safetensors"
        ) from None
