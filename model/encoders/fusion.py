"""CLIP's encoder with fusion: in training, each image and caption is enriched with others of its identity (LCR2S)."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from model.encoders.base import ENCODERS, Encoded
from model.encoders.clip import CLIPEncoder
from utils.batch import Batch
from utils.errors import ConfigError


class Fusion(nn.Module):
    """One attention block whose query is a sample and whose keys are that sample and its support.

    Its output layers begin at 0, so that at first the enriched embedding is the sample's own. LCR2S says "multi-head
    attentional fusion"; this form of it is ours (LCR2S spec 5), as the paper's could not be had.
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
        """(B, D) enriched with (B, M, D), of which bool (B, M) are real -> (B, D). M may be 0, and a mask empty."""
        support = support.masked_fill(~mask[:, :, None], 0)  # whatever is there, NaN too
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        keys = self.norm1(torch.cat([anchor[:, None], support], dim=1))
        found, _ = self.attention(keys[:, :1], keys, keys, key_padding_mask=~mask, need_weights=False)
        return self._residual(anchor, found[:, 0])

    def within(self, samples: Tensor, related: Tensor) -> Tensor:
        """(B, D), each enriched with those that bool (B, B) relates it to, itself among them -> (B, D)."""
        keys = self.norm1(samples)[None]
        found, _ = self.attention(keys, keys, keys, attn_mask=~related, need_weights=False)
        return self._residual(samples, found[0])

    def _residual(self, samples: Tensor, found: Tensor) -> Tensor:
        samples = samples + found
        return samples + self.out(self.act(self.hidden(self.norm2(samples))))


class _Fusing(CLIPEncoder):
    """CLIP's encoder, and a fusion for each modality."""

    def __init__(
        self, image_size: tuple[int, int], text_length: int, pretrained: bool, heads: int, **clip: Any
    ) -> None:
        super().__init__(image_size, text_length, pretrained, **clip)
        if heads < 1 or self.embed_dim % heads:
            raise ConfigError(f"model.heads: must divide model.embed_dim, {self.embed_dim}, is {heads}")
        self.fusion = nn.ModuleDict({tower: Fusion(self.embed_dim, heads) for tower in ("image", "text")})

    def fusion_of(self, tower: str) -> Fusion:
        """Typed view of `fusion`."""
        module = self.fusion[tower]
        assert isinstance(module, Fusion)
        return module


@ENCODERS.register("fusion")
class FusionEncoder(_Fusing):
    """LCR2S-style teacher (after Yan et al., ACM MM 2023): the losses see embeddings enriched by support sets.

    `encode_image` and `encode_text`, and so evaluation, know no support.

    Args:
        image_size, text_length, pretrained, clip: as in `CLIPEncoder`.
        heads: of the fusion's attention.
        support_grad: whether the towers learn from the support sets, too; false saves most of their memory.
    """

    inputs = frozenset({"support_images", "support_image_mask", "support_caption_ids", "support_caption_mask"})

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        heads: int = 8,
        support_grad: bool = True,
        **clip: Any,
    ) -> None:
        super().__init__(image_size, text_length, pretrained, heads, **clip)
        self.support_grad = support_grad

    def enrich(self, image: Encoded, text: Encoded, batch: Batch) -> tuple[Encoded, Encoded]:
        image_mask, text_mask = batch["support_image_mask"], batch["support_caption_mask"]
        with torch.set_grad_enabled(self.support_grad and torch.is_grad_enabled()):
            images = self._placed(batch["support_images"], image_mask, self.encode_image)
            texts = self._placed(batch["support_caption_ids"], text_mask, self.encode_text)
        return (
            image._replace(embedding=self.fusion_of("image")(image.embedding, images, image_mask)),
            text._replace(embedding=self.fusion_of("text")(text.embedding, texts, text_mask)),
        )

    def _placed(self, items: Tensor, mask: Tensor, encode: Callable[[Tensor], Encoded]) -> Tensor:
        """The embeddings of the real items, each in its slot of (B, M, D); zeros elsewhere."""
        if not len(items):
            return torch.zeros(*mask.shape, self.embed_dim, device=mask.device)
        embedding = encode(items).embedding
        return embedding.new_zeros(*mask.shape, self.embed_dim).masked_scatter(mask[:, :, None], embedding)


@ENCODERS.register("batch_fusion")
class BatchFusionEncoder(_Fusing):
    """LCR2S-style in one stage (LCR2S spec 7C): the other rows of an identity in the batch are the support.

    The losses see the plain embedding and the enriched one, which is also the teacher of the plain one.

    Args:
        image_size, text_length, pretrained, clip: as in `CLIPEncoder`.
        heads: of the fusion's attention.
    """

    inputs = frozenset({"image_ids", "index"})
    teaches = True

    def __init__(
        self, image_size: tuple[int, int], text_length: int, pretrained: bool, *, heads: int = 8, **clip: Any
    ) -> None:
        super().__init__(image_size, text_length, pretrained, heads, **clip)

    def enrich(self, image: Encoded, text: Encoded, batch: Batch) -> tuple[Encoded, Encoded]:
        images, texts = related_rows(batch["pids"], batch["image_ids"], batch["index"])
        return (
            image._replace(more=(self.fusion_of("image").within(image.embedding, images),)),
            text._replace(more=(self.fusion_of("text").within(text.embedding, texts),)),
        )


def related_rows(pids: Tensor, image_ids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (B, B) for images and for captions: each row, and those of its identity with another image, or caption.

    A row that a sampler repeats is no support of its repetition.
    """
    same, own = pids[:, None] == pids[None, :], torch.eye(len(pids), dtype=torch.bool, device=pids.device)
    images, captions = (same & (numbers[:, None] != numbers[None, :]) | own for numbers in (image_ids, index))
    return images, captions
