"""CLIP's dual encoder with all tokens projected: a timm vision transformer and a transformers text tower."""

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn

from model.checkpoints.facts import TIMM_NAMES
from model.checkpoints.grids import PatchGrid
from model.encoders.base import ENCODERS, Encoded, Encoder
from model.encoders.mlp import lean_mlps
from model.encoders.towers import (
    ImageOptions,
    Temperature,
    TextOptions,
    activation_of,
    build_text_model,
    build_vit,
    load_vit,
    patches_of,
    set_patch_grid,
)
from utils.batch import end_of_text
from utils.errors import ConfigError
from utils.options import Option


@ENCODERS.register("clip")
class CLIPEncoder(Encoder):
    """CLIP's dual encoder (Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020).

    All tokens are projected, as in IRRA (anosorae/IRRA@cfc2378:model/clip_model.py:CLIP).

    Args:
        embed_dim: dimensions of the joint space.
        temperature: constant softmax temperature of the losses.
        image: vision tower.
        text: text tower.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        embed_dim: Annotated[int, Option(ge=1, le=1_000_000)] = 512,
        temperature: Temperature = 0.02,
        image: ImageOptions = ImageOptions(),
        text: TextOptions = TextOptions(),
    ) -> None:
        super().__init__()
        if not pretrained:
            image, text = replace(image, pretrained=False), replace(text, pretrained=False)
        self.image = ImageTower(image_size, embed_dim, image)
        self.text = TextTower(text_length, embed_dim, text)
        self.image_size, self.embed_dim, self.logit_scale = image_size, embed_dim, 1 / temperature
        self.vocab_size = self.text.trunk.config.vocab_size
        self.notes = self.image.notes

    def encode_image(self, images: Tensor) -> Encoded:
        tokens = self.image(images)
        return Encoded(tokens[:, 0], tokens)

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        tokens = self.text(caption_ids)
        return Encoded(tokens[torch.arange(len(tokens), device=tokens.device), end_of_text(caption_ids)], tokens)

    def compile_towers(self) -> None:
        self.image.compile()
        self.text.compile(dynamic=True)  # else the first text length gets a graph of its own

    def patches(self, name: str) -> PatchGrid | None:
        return patches_of(self.image.trunk, self.image_size) if name == "image.trunk.pos_embed" else None

    @property
    def activations(self) -> dict[str, str]:
        text: str = self.text.trunk.config.hidden_act
        return {"image": activation_of(self.image.trunk), "text": TIMM_NAMES.get(text, text)}


class ImageTower(nn.Module):
    """Images float (B, 3, H, W) -> tokens (B, 1 + N, embed_dim): class token, then patches row by row."""

    def __init__(self, image_size: tuple[int, int], embed_dim: int, options: ImageOptions) -> None:
        super().__init__()
        trunk = build_vit(options, img_size=tuple(image_size), num_classes=embed_dim)
        set_patch_grid(trunk, image_size, options.stride)
        width = trunk.embed_dim
        nn.init.normal_(trunk.head.weight, std=width**-0.5)  # CLIP's scheme; some of timm's start at zero
        self.notes = load_vit(trunk, options, image_size) if options.pretrained else ()
        self.projection = nn.Linear(width, embed_dim, bias=False)  # without the bias of timm's head, as in CLIP
        self.projection.weight = trunk.head.weight
        trunk.reset_classifier(0)
        self.trunk, self.has_class_token = trunk, trunk.num_prefix_tokens == 1

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(images)
        if not self.has_class_token:  # a learnt map pools the patches, as in SigLIP
            tokens = torch.cat([self.trunk.forward_head(tokens, pre_logits=True)[:, None], tokens], dim=1)
        projected: Tensor = self.projection(tokens)
        return projected


class TextTower(nn.Module):
    """Token ids int64 (B, L) -> tokens (B, L, embed_dim), causal; L may be less than the context length."""

    def __init__(self, text_length: int, embed_dim: int, options: TextOptions) -> None:
        super().__init__()
        model = build_text_model(embed_dim, options)
        if model.config.max_position_embeddings < text_length:
            raise ConfigError(
                f"data.text_length: must be at most {model.config.max_position_embeddings}, the positions of the text "
                f"tower (model.text), got {text_length}"
            )
        if model.config.projection_dim != embed_dim:
            raise ConfigError(
                f"model.embed_dim: must be {model.config.projection_dim} like the projection of {options.arch}, "
                f"got {embed_dim}"
            )
        if options.checkpointing:
            # The name in transformers 5.23, and in earlier versions.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        lean_mlps(model)
        self.trunk, self.projection = model.text_model, model.text_projection

    def forward(self, caption_ids: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.trunk(input_ids=caption_ids).last_hidden_state)
        return projected
