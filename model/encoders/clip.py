"""CLIP's dual encoder with all tokens projected: a timm vision transformer and a transformers text tower."""

from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from model.encoders.base import ENCODERS, Encoded, Encoder
from utils.errors import ConfigError
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

    arch: str = "vit_base_patch16_clip_quickgelu_224.openai"  # a timm vision transformer with a class token
    stride: int | None = None  # pixels between patches; null: the patch size; less: overlapping patches
    pretrained: bool = True  # start from the weights that timm has under this name
    options: dict[str, Any] = field(default_factory=dict)  # passed on to timm, for instance depth or patch_size


@dataclass(frozen=True)
class TextOptions:
    """The text tower."""

    arch: str = "openai/clip-vit-base-patch16"  # a CLIP model of the hub, a local folder of one, or `clip`
    pretrained: bool = True  # start from the weights of this name
    options: dict[str, Any] = field(default_factory=dict)  # of transformers' CLIPTextConfig


@ENCODERS.register("clip")
class CLIPEncoder(Encoder):
    """Radford et al., ICML 2021, as IRRA uses it (IRRA model/clip_model.py:CLIP): all tokens are projected.

    Args:
        image_size: height and width in pixels.
        text_length: most columns that `encode_text` is given.
        pretrained: False leaves pretrained weights out, whatever the towers' options say.
        embed_dim: D, the joint space.
        temperature: the losses' softmax temperature, constant.
        image: vision tower.
        text: text tower.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        embed_dim: int = 512,
        temperature: float = 0.02,
        image: ImageOptions = ImageOptions(),
        text: TextOptions = TextOptions(),
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ConfigError(f"model.embed_dim: must be at least 1, is {embed_dim}")
        if temperature <= 0:
            raise ConfigError(f"model.temperature: must be above 0, is {temperature}")
        self.image = ImageTower(image_size, embed_dim, replace(image, pretrained=image.pretrained and pretrained))
        self.text = TextTower(text_length, embed_dim, replace(text, pretrained=text.pretrained and pretrained))
        self.embed_dim, self.logit_scale = embed_dim, 1 / temperature
        self.vocab_size = self.text.trunk.config.vocab_size

    def encode_image(self, images: Tensor) -> Encoded:
        tokens = self.image(images)
        return Encoded(tokens[:, 0], tokens)

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        tokens = self.text(caption_ids)
        end_of_text = caption_ids.argmax(dim=1)  # it has the largest id
        return Encoded(tokens[torch.arange(len(tokens), device=tokens.device), end_of_text], tokens)


class ImageTower(nn.Module):
    """float (B, 3, H, W) -> (B, 1 + N, embed_dim): class token, then patches row by row."""

    def __init__(self, image_size: tuple[int, int], embed_dim: int, options: ImageOptions) -> None:
        super().__init__()
        trunk = _build_vit(options, img_size=tuple(image_size), num_classes=embed_dim)
        patch = trunk.patch_embed.patch_size
        stride = patch[0] if options.stride is None else options.stride
        if not 0 < stride <= min(patch) or min(image_size[0] - patch[0], image_size[1] - patch[1]) < 0:
            raise ConfigError(
                f"model.image.stride: {stride} and patches of {patch[0]}x{patch[1]} do not fit images of {image_size}"
            )
        rows, columns = (1 + (size - edge) // stride for size, edge in zip(image_size, patch, strict=True))
        trunk.patch_embed.proj.stride = (stride, stride)
        trunk.patch_embed.grid_size, trunk.patch_embed.num_patches = (rows, columns), rows * columns
        width = trunk.embed_dim
        trunk.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, width).normal_(std=0.02))
        nn.init.normal_(trunk.head.weight, std=width**-0.5)  # CLIP's; timm's own schemes may begin with zeros
        if options.pretrained:
            state = _pretrained_vit(options, num_classes=embed_dim).state_dict()
            state["pos_embed"] = resize_position_grid(state["pos_embed"], (rows, columns))
            trunk.load_state_dict(state)
        self.projection = nn.Linear(width, embed_dim, bias=False)  # CLIP has no bias where timm's head has one
        self.projection.weight = trunk.head.weight
        trunk.reset_classifier(0)
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.trunk.forward_features(images))


class TextTower(nn.Module):
    """int64 (B, L) -> (B, L, embed_dim), causal; L may be less than the context length."""

    def __init__(self, text_length: int, embed_dim: int, options: TextOptions) -> None:
        super().__init__()
        model = _build_text_model(embed_dim, options)
        if model.config.max_position_embeddings < text_length:
            raise ConfigError(
                f"data.text_length: {text_length} tokens, but the text tower has "
                f"{model.config.max_position_embeddings} positions (model.text)"
            )
        if model.config.projection_dim != embed_dim:
            raise ConfigError(
                f"model.embed_dim: {embed_dim}, but {options.arch} projects to {model.config.projection_dim} dimensions"
            )
        self.trunk, self.projection = model.text_model, model.text_projection

    def forward(self, caption_ids: Tensor) -> Tensor:
        return self.projection(self.trunk(input_ids=caption_ids).last_hidden_state)


def resize_position_grid(position_embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square grid's position embedding (1, 1 + n*n, W) -> (1, 1 + rows*columns, W); the class token's is kept.

    Bilinear, not antialiased, corners not aligned (IRRA model/clip_model.py:resize_pos_embed; spec 1.1).
    """
    rows, columns = grid
    cls, patches = position_embedding[:, :1], position_embedding[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} positions are no square grid")
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square.float(), size=(rows, columns), mode="bilinear", align_corners=False)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)


def _build_vit(options: ImageOptions, **facts: Any) -> VisionTransformer:
    """A fresh timm model; `facts` are what the framework decides (size, number of outputs)."""
    name = options.arch.split(".")[0]
    if not timm.is_model(name):
        raise ConfigError(
            f"model.image.arch: {did_you_mean(name, timm.list_models('vit_*clip*'))}; timm has no '{name}'"
        )
    try:
        model = timm.create_model(options.arch, pretrained=False, **facts, **options.options)
    except BAD_OPTIONS as error:
        raise ConfigError(
            f"model.image.options: timm cannot build {options.arch} with them: {_reason(error)}"
        ) from None
    if not isinstance(model, VisionTransformer) or model.num_prefix_tokens != 1 or model.pos_embed is None:
        raise ConfigError(f"model.image.arch: {options.arch} is no vision transformer with one class token")
    return model


def _pretrained_vit(options: ImageOptions, **facts: Any) -> VisionTransformer:
    try:
        return timm.create_model(options.arch, pretrained=True, **facts, **options.options)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_weights("image", options.arch, error) from None


def _build_text_model(embed_dim: int, options: TextOptions) -> CLIPTextModelWithProjection:
    known = CLIPTextConfig().to_dict()
    for name in options.options:
        if name not in known:
            raise ConfigError(f"model.text.options.{name}: unknown key; {did_you_mean(name, known)}")
    if options.pretrained:
        return _pretrained_text_model(options)
    if options.arch not in TEXT_ARCHS:
        raise ConfigError(f"model.text.arch: unknown '{options.arch}'; {did_you_mean(options.arch, TEXT_ARCHS)}")
    sizes = {**TEXT_ARCHS[options.arch], **options.options}
    try:
        vocab_size = sizes.get("vocab_size", known["vocab_size"])
        special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}  # where CLIP's vocabulary ends too
        return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=embed_dim, **{**special, **sizes}))
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build the text tower: {_reason(error)}") from None


def _pretrained_text_model(options: TextOptions) -> CLIPTextModelWithProjection:
    try:
        return CLIPTextModelWithProjection.from_pretrained(options.arch, **options.options)
    except OSError as error:
        raise _no_weights("text", options.arch, error) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text: {options.arch} cannot be loaded with these options: {_reason(error)}") from None


def _no_weights(tower: str, arch: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.{tower}.arch: the weights of {arch} are not in the hub's cache and cannot be had from the hub "
        f"({_reason(error)}); model.{tower}.pretrained=false starts from random ones"
    )


def _reason(error: Exception) -> str:
    """The last line of a library's message, which names the cause where there are several."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
