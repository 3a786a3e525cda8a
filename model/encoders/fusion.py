"""CLIP encoders with fusion of images and captions of the same identity (docs/methods/lcr2s.md)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from model.encoders.base import ENCODERS, Encoded
from model.encoders.clip import CLIPEncoder
from utils.batch import Batch
from utils.errors import ConfigError
from utils.options import Option

Heads = Annotated[int, Option(ge=1)]


class Fusion(nn.Module):
    """One attention block with a sample as query, and the sample and its support set as keys.

    Its output layers start at zero, so that the enriched embedding is the sample's at first. LCR2S describes
    "multi-head attentional fusion"; this form of it is ours (docs/methods/lcr2s.md#fusion).

    Args:
        embed_dim: dimensions of the embeddings.
        heads: attention heads.
    """

    def __init__(self, embed_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention = nn.MultiheadAttention(embed_dim, heads, batch_first=True)
        self.hidden, self.act = nn.Linear(embed_dim, 4 * embed_dim), QuickGELU()
        self.out = nn.Linear(4 * embed_dim, embed_dim)
        for parameter in (*self.attention.out_proj.parameters(), *self.out.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, anchor: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """Enrich embeddings (B, D) with support sets (B, M, D) -> (B, D).

        Args:
            anchor: embeddings of the samples.
            support: embeddings of their support sets; M may be 0.
            mask: bool (B, M), occupied slots; a row may have none.
        """
        support = support.masked_fill(~mask[:, :, None], 0)  # empty slots may hold NaN
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        keys = self.norm1(torch.cat([anchor[:, None], support], dim=1))
        found, _ = self.attention(keys[:, :1], keys, keys, key_padding_mask=~mask, need_weights=False)
        return self._residual(anchor, found[:, 0])

    def within(self, samples: Tensor, related: Tensor) -> Tensor:
        """Enrich embeddings (B, D) with one another -> (B, D).

        Args:
            samples: embeddings.
            related: bool (B, B), the samples that each one is enriched with, itself included.
        """
        keys = self.norm1(samples)[None]
        found, _ = self.attention(keys, keys, keys, attn_mask=~related, need_weights=False)
        return self._residual(samples, found[0])

    def _residual(self, samples: Tensor, found: Tensor) -> Tensor:
        samples = samples + found
        hidden: Tensor = self.act(self.hidden(self.norm2(samples)))
        change: Tensor = self.out(hidden)
        return samples + change


class _Fusing(CLIPEncoder):
    """CLIP's encoder with a fusion block per modality."""

    optional_modules = ("fusion.",)

    def __init__(
        self, image_size: tuple[int, int], text_length: int, pretrained: bool, heads: int, **clip: Any
    ) -> None:
        super().__init__(image_size, text_length, pretrained, **clip)
        if self.embed_dim % heads:
            raise ConfigError(f"model.heads: must be a divisor of model.embed_dim ({self.embed_dim}), got {heads}")
        self.fusion = nn.ModuleDict({tower: Fusion(self.embed_dim, heads) for tower in ("image", "text")})

    def fusion_of(self, tower: str) -> Fusion:
        """Typed view of `fusion`."""
        module = self.fusion[tower]
        assert isinstance(module, Fusion)
        return module


@ENCODERS.register("fusion")
class FusionEncoder(_Fusing):
    """LCR2S-style teacher (after Yan et al., ACM MM 2023): losses see embeddings enriched by support sets.

    `encode_image` and `encode_text`, and therefore evaluation, use no support sets.

    Args:
        heads: attention heads of the fusion.
        support_grad: backpropagate through the support sets; False saves most of their memory.
        clip: options of `CLIPEncoder`.
    """

    inputs = frozenset({"support_images", "support_image_mask", "support_caption_ids", "support_caption_mask"})
    why_not_shard = "a process without support sets runs fewer passes of the towers than the others"

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        heads: Heads = 8,
        support_grad: bool = True,
        **clip: Any,
    ) -> None:
        super().__init__(image_size, text_length, pretrained, heads, **clip)
        self.support_grad = support_grad

    def enrich(self, image: Encoded, text: Encoded, batch: Batch) -> tuple[Encoded, Encoded]:
        image_mask, text_mask = batch["support_image_mask"], batch["support_caption_mask"]
        with torch.set_grad_enabled(self.support_grad and torch.is_grad_enabled()):
            images = self._in_slots(batch["support_images"], image_mask, self.encode_image)
            texts = self._in_slots(batch["support_caption_ids"], text_mask, self.encode_text)
        return (
            image._replace(embedding=self.fusion_of("image")(image.embedding, images, image_mask)),
            text._replace(embedding=self.fusion_of("text")(text.embedding, texts, text_mask)),
        )

    def _in_slots(self, items: Tensor, mask: Tensor, encode: Callable[[Tensor], Encoded]) -> Tensor:
        """Embeddings of the items in their slots, (B, M, D); zeros in empty slots."""
        if not len(items):
            return torch.zeros(*mask.shape, self.embed_dim, device=mask.device)
        embedding = encode(items).embedding
        return embedding.new_zeros(*mask.shape, self.embed_dim).masked_scatter(mask[:, :, None], embedding)


@ENCODERS.register("batch_fusion")
class BatchFusionEncoder(_Fusing):
    """LCR2S-style in one stage: the other rows of an identity in the batch are its support set.

    Losses see the plain and the enriched embedding; the enriched one is also the teacher of the plain one.

    Args:
        heads: attention heads of the fusion.
        clip: options of `CLIPEncoder`.
    """

    inputs = frozenset({"image_ids", "index"})
    teaches_itself = True

    def __init__(
        self, image_size: tuple[int, int], text_length: int, pretrained: bool, *, heads: Heads = 8, **clip: Any
    ) -> None:
        super().__init__(image_size, text_length, pretrained, heads, **clip)

    def relate(self, image: Tensor, text: Tensor, rows: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
        images, texts = related_rows(rows["pids"], rows["image_ids"], rows["index"])
        return ((self.fusion_of("image").within(image, images), self.fusion_of("text").within(text, texts)),)


def related_rows(pids: Tensor, image_ids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Support sets within a batch, for images and for captions: bool (B, B) each.

    A row is related to itself and to the rows of its identity with another image, or another caption. Repetitions of a
    row by the sampler do not support each other.
    """
    same, itself = pids[:, None] == pids[None, :], torch.eye(len(pids), dtype=torch.bool, device=pids.device)
    images, captions = (same & (numbers[:, None] != numbers[None, :]) | itself for numbers in (image_ids, index))
    return images, captions
