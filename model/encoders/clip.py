"""CLIP's dual encoder with all tokens projected: a timm vision transformer and a transformers text tower."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.encoders.base import ENCODERS, Encoded, Encoder
from model.encoders.towers import (
    ImageOptions,
    TextOptions,
    build_text_model,
    build_vit,
    load_vit,
    resize_position_grid,
    set_patch_grid,
)
from utils.errors import ConfigError


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
        if not pretrained:
            image, text = replace(image, pretrained=False), replace(text, pretrained=False)
        self.image = ImageTower(image_size, embed_dim, image)
        self.text = TextTower(text_length, embed_dim, text)
        self.embed_dim, self.logit_scale = embed_dim, 1 / temperature
        self.vocab_size = self.text.trunk.config.vocab_size
        self.notes = self.image.notes

    def encode_image(self, images: Tensor) -> Encoded:
        tokens = self.image(images)
        return Encoded(tokens[:, 0], tokens)

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        tokens = self.text(caption_ids)
        end_of_text = caption_ids.argmax(dim=1)  # it has the largest id
        return Encoded(tokens[torch.arange(len(tokens), device=tokens.device), end_of_text], tokens)

    def resize(self, name: str, value: Tensor) -> Tensor | None:
        trunk = self.image.trunk
        if name != "image.trunk.pos_embed" or value.ndim != 3 or value.shape[-1] != trunk.embed_dim:
            return None
        return resize_position_grid(value, trunk.patch_embed.grid_size, trunk.num_prefix_tokens)


class ImageTower(nn.Module):
    """float (B, 3, H, W) -> (B, 1 + N, embed_dim): class token, then patches row by row."""

    def __init__(self, image_size: tuple[int, int], embed_dim: int, options: ImageOptions) -> None:
        super().__init__()
        trunk = build_vit(options, img_size=tuple(image_size), num_classes=embed_dim)
        set_patch_grid(trunk, image_size, options.stride)
        width = trunk.embed_dim
        nn.init.normal_(trunk.head.weight, std=width**-0.5)  # CLIP's; timm's own schemes may begin with zeros
        self.notes = load_vit(trunk, options) if options.pretrained else ()
        self.projection = nn.Linear(width, embed_dim, bias=False)  # CLIP has no bias where timm's head has one
        self.projection.weight = trunk.head.weight
        trunk.reset_classifier(0)
        self.trunk, self.has_class_token = trunk, trunk.num_prefix_tokens == 1

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(images)
        if not self.has_class_token:  # SigLIP's kind: a learnt map pools the patches
            tokens = torch.cat([self.trunk.forward_head(tokens, pre_logits=True)[:, None], tokens], dim=1)
        return self.projection(tokens)


class TextTower(nn.Module):
    """int64 (B, L) -> (B, L, embed_dim), causal; L may be less than the context length."""

    def __init__(self, text_length: int, embed_dim: int, options: TextOptions) -> None:
        super().__init__()
        model = build_text_model(embed_dim, options)
        if model.config.max_position_embeddings < text_length:
            raise ConfigError(
                f"data.text_length: {text_length} tokens, but the text tower has "
                f"{model.config.max_position_embeddings} positions (model.text)"
            )
        if model.config.projection_dim != embed_dim:
            raise ConfigError(
                f"model.embed_dim: {embed_dim}, but {options.arch} projects to {model.config.projection_dim} dimensions"
            )
        if options.checkpointing:
            # Its name in transformers 5.23, and before.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.trunk, self.projection = model.text_model, model.text_projection

    def forward(self, caption_ids: Tensor) -> Tensor:
        return self.projection(self.trunk(input_ids=caption_ids).last_hidden_state)
