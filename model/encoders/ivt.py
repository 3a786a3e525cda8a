"""IVT's encoder: one vision transformer for images and captions, with an MLP per modality in every block."""

import copy
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.checkpoints.grids import PatchGrid
from model.encoders.base import ENCODERS, Encoded, Encoder
from model.encoders.bert_embeddings import WordOptions, build_words, load_text_mlps
from model.encoders.towers import (
    ImageOptions,
    Temperature,
    activation_of,
    build_vit,
    load_vit,
    patches_of,
    set_patch_grid,
)
from utils.batch import caption_mask
from utils.errors import ConfigError
from utils.options import Option

IMAGE = ImageOptions(arch="vit_base_patch16_224.orig_in21k_ft_in1k", stride=12)


class SharedBlock(Block):  # type: ignore[misc]  # timm has no types
    """timm's block with shared attention and norms, and two MLPs: `mlp` for images, `text_mlp` for captions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_mlp = copy.deepcopy(self.mlp)

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None, *, text: bool = False) -> Tensor:
        mlp = self.text_mlp if text else self.mlp
        tokens = tokens + self.drop_path1(self.ls1(self.attn(self.norm1(tokens), attn_mask=attn_mask)))
        mixed: Tensor = tokens + self.drop_path2(self.ls2(mlp(self.norm2(tokens))))
        return mixed


@ENCODERS.register("ivt")
class IVTEncoder(Encoder):
    """IVT's shared transformer (Shu et al., ECCV Workshops 2022, https://arxiv.org/abs/2208.08608).

    Both embeddings are the first token behind the last norm: the class token, and the caption's first token. There is
    no projection, so `embed_dim` is the transformer's width. In training, bidirectional mask modelling drops a random
    number of tokens before the first block: 0 to floor(mask_ratio * tokens), never the first one. Details and
    deviations are in docs/methods/ivt.md#model.

    Args:
        temperature: softmax temperature of losses that have one; IVT's cmpm has none.
        mask_ratio: largest fraction of the tokens that a training step drops.
        mask_per_sample: draw the dropped positions per image and caption; in the authors' code, a batch shares them.
        drop_path: stochastic depth of the last block; it rises linearly from 0 in the first.
        image: vision transformer and image embeddings.
        text: caption embeddings, and initial weights of the text MLPs.
    """

    tokenizers = ("wordpiece", "clip")

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        temperature: Temperature = 0.02,
        mask_ratio: Annotated[float, Option(ge=0, lt=1)] = 0.2,
        mask_per_sample: bool = False,
        drop_path: Annotated[float, Option(ge=0, lt=1)] = 0.1,
        image: ImageOptions = IMAGE,
        text: WordOptions = WordOptions(),
    ) -> None:
        super().__init__()
        if not pretrained:
            image, text = replace(image, pretrained=False), replace(text, pretrained=False)
        settings = {"num_classes": 0, "block_fn": SharedBlock, "drop_path_rate": drop_path}
        self.trunk = build_vit(image, img_size=tuple(image_size), **settings)
        if self.trunk.num_prefix_tokens != 1:
            raise ConfigError(f"model.image.arch: must have a class token, which is IVT's embedding, got {image.arch}")
        set_patch_grid(self.trunk, image_size, image.stride)
        self.type_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty_like(self.trunk.pos_embed), std=0.02))
        self.words = build_words(self.trunk.embed_dim, text_length, text)
        self.notes = load_vit(self.trunk, image, image_size, keep=".text_mlp.") if image.pretrained else ()
        if text.pretrained:
            load_text_mlps(self.words, self.trunk.blocks, text)
        self.image_size, self.embed_dim, self.logit_scale = image_size, self.trunk.embed_dim, 1 / temperature
        self.vocab_size = self.words.word_embeddings.num_embeddings
        self.mask_ratio, self.mask_per_sample = mask_ratio, mask_per_sample
        if mask_ratio > 0:
            self.why_no_tokens = f"model.mask_ratio={mask_ratio} drops some in training; set model.mask_ratio=0"

    def encode_image(self, images: Tensor) -> Encoded:
        patches = self.trunk.patch_embed(images)
        tokens = torch.cat([self.trunk.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self._encode(self.trunk.norm_pre(tokens + self.trunk.pos_embed + self.type_embed))

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        return self._encode(self.words(input_ids=caption_ids), caption_mask(caption_ids), text=True)

    def _encode(self, tokens: Tensor, mask: Tensor | None = None, *, text: bool = False) -> Encoded:
        if self.training and self.mask_ratio:
            tokens, mask = keep_tokens(tokens, mask, self._draw_kept(len(tokens), tokens.shape[1], tokens.device))
        return self.run_blocks(tokens, mask, text=text)

    def run_blocks(self, tokens: Tensor, mask: Tensor | None, *, text: bool) -> Encoded:
        """Run all blocks and the last norm.

        Args:
            tokens: embedded tokens (B, T, D).
            mask: bool (B, T), False for padding.
            text: use the MLPs of captions.
        """
        keys = None if mask is None else mask[:, None, None]  # for all heads and queries
        recompute = self.trunk.grad_checkpointing and torch.is_grad_enabled()
        for block in self.trunk.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            tokens = run(tokens, keys, text=text)
        tokens = self.trunk.norm(tokens)
        return Encoded(tokens[:, 0], tokens)

    def _draw_kept(self, batch: int, num_tokens: int, device: torch.device | None = None) -> Tensor:
        """Positions to keep, the first token in front: int64 (1, T'), or (B, T') with `mask_per_sample`."""
        most = int(self.mask_ratio * num_tokens)
        dropped = int(torch.randint(most + 1, ()))  # drawn on the CPU, without a device sync
        rows = batch if self.mask_per_sample else 1
        kept = 1 + torch.rand(rows, num_tokens - 1, device=device).argsort(dim=1)[:, dropped:]
        return torch.cat([kept.new_zeros(rows, 1), kept], dim=1)

    def compile_towers(self) -> None:
        for block in self.trunk.blocks:
            block.compile()

    def patches(self, name: str) -> PatchGrid | None:
        return patches_of(self.trunk, self.image_size) if name in ("trunk.pos_embed", "type_embed") else None

    @property
    def activations(self) -> dict[str, str]:
        return {"image": activation_of(self.trunk)}


def keep_tokens(tokens: Tensor, mask: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Select tokens (B, T, D) and their mask (B, T) at the positions `kept`, int64 (1 or B, T')."""
    if len(kept) == 1:
        return tokens[:, kept[0]], None if mask is None else mask[:, kept[0]]
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[rows, kept], None if mask is None else mask[rows, kept]
