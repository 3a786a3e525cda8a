"""CLIP's encoder with a second embedding, pooled from the tokens that the last block attends to most (RDE)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoders.base import ENCODERS, Encoded
from model.encoders.clip import CLIPEncoder
from utils.errors import ConfigError


@ENCODERS.register("token_selection")
class TokenSelectionEncoder(CLIPEncoder):
    """Qin et al., CVPR 2024, section 3.2 (RDE model/build.py, model/grab.py; RDE spec 3).

    Args:
        image_size, text_length, pretrained, clip: as in `CLIPEncoder`.
        selected_dim: of the second embedding.
        ratio: part of the patches, and of the words that `text_length` has room for, that it is pooled from.
        bn: `frozen` normalises by the running statistics and never moves them, as the published numbers had it;
            `batch` is batch normalisation as usual, which the authors' repository has since October 2024.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        selected_dim: int = 1024,
        ratio: float = 0.3,
        bn: Literal["frozen", "batch"] = "frozen",
        **clip: Any,
    ) -> None:
        super().__init__(image_size, text_length, pretrained, **clip)
        if selected_dim < 2:
            raise ConfigError(f"model.selected_dim: must be at least 2, is {selected_dim}")
        if not 0 < ratio <= 1:
            raise ConfigError(f"model.ratio: is a part of the tokens, above 0 and at most 1, is {ratio}")
        if not self.image.has_class_token:
            raise ConfigError("model.image.arch: has no class token that attends to the patches")
        self.embeddings = {"bge": self.embed_dim, "tse": selected_dim}
        self.num_patches = max(1, int(self.image.trunk.patch_embed.num_patches * ratio))
        self.num_words = max(1, int((text_length - 2) * ratio))
        self.batch_statistics = bn == "batch"
        self.full_text = bn == "batch"  # its statistics count the padding that short captions are filled up with
        self.selection = nn.ModuleDict(
            {tower: TokenMLP(self.embed_dim, selected_dim, bn == "frozen") for tower in ("image", "text")}
        )
        last = self.image.trunk.blocks[-1].attn
        self.image_attention = Attention(last.q_norm, last.k_norm)  # these are behind the split into heads
        last = self.text.trunk.encoder.layers[-1].self_attn
        self.text_attention = Attention(last.q_proj, last.k_proj)
        self.text_heads: int = last.num_heads

    def encode_image(self, images: Tensor) -> Encoded:
        embedding, tokens, _ = super().encode_image(images)
        query, keys = self.image_attention.take()
        scores = attention(query[:, :, 0], keys)[:, 1:]
        chosen = 1 + scores.topk(self.num_patches).indices
        return Encoded(embedding, tokens, (self.selection["image"](gather(tokens, chosen)),))

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        embedding, tokens, _ = super().encode_text(caption_ids)
        query, keys = (part.unflatten(2, (self.text_heads, -1)).transpose(1, 2) for part in self.text_attention.take())
        end = caption_ids.argmax(dim=1)
        last = end[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3])
        seen = torch.arange(query.shape[2], device=end.device) <= end[:, None]
        scores = attention(query.gather(2, last).squeeze(2), keys, seen)
        chosen, count = select_words(scores, end, self.num_words)
        return Encoded(embedding, tokens, (self.selection["text"](gather(tokens, chosen), count),))


class TokenMLP(nn.Module):
    """Tokens (B, k, D) -> (B, D'): a residual MLP on each unit token, then the largest value of each dimension."""

    def __init__(self, embed_dim: int, selected_dim: int, frozen: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(embed_dim, selected_dim // 2)
        self.norm = nn.BatchNorm1d(selected_dim // 2)
        self.out = nn.Linear(selected_dim // 2, selected_dim)
        self.skip = nn.Linear(embed_dim, selected_dim)
        self.frozen = frozen

    def train(self, mode: bool = True) -> "TokenMLP":
        super().train(mode)
        self.norm.train(mode and not self.frozen)
        return self

    def forward(self, tokens: Tensor, count: Tensor | None = None) -> Tensor:
        """`count` (B,): how many of the k tokens are pooled; None: all."""
        tokens = tokens / (tokens.norm(dim=-1, keepdim=True) + 1e-8)
        hidden = self.norm(self.hidden(tokens).flatten(0, 1)).unflatten(0, tokens.shape[:2])
        values = self.out(F.relu(hidden)) + self.skip(tokens)
        if count is not None:
            unused = torch.arange(tokens.shape[1], device=count.device) >= count[:, None]
            values = values.masked_fill(unused[:, :, None], -torch.inf)
        return values.max(dim=1).values


class Attention:
    """Keeps what two modules of an attention layer gave last, its queries and its keys, without their gradient."""

    def __init__(self, query: nn.Module, keys: nn.Module) -> None:
        self.query: Tensor | None = None
        self.keys: Tensor | None = None
        query.register_forward_hook(self._keep_query)
        keys.register_forward_hook(self._keep_keys)

    def take(self) -> tuple[Tensor, Tensor]:
        """Queries and keys of the forward pass that was just made; they are let go of."""
        query, keys = self.query, self.keys
        assert query is not None and keys is not None
        self.query = self.keys = None
        return query, keys

    def _keep_query(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.query = output.detach()

    def _keep_keys(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.keys = output.detach()


def attention(query: Tensor, keys: Tensor, seen: Tensor | None = None) -> Tensor:
    """Softmax attention of one position to all, averaged over heads, float32 (B, N).

    Args:
        query: (B, heads, d), of that position.
        keys: (B, heads, N, d).
        seen: bool (B, N), the positions that it attends to; None: all.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = (keys.float() @ query.float()[..., None]).squeeze(3) * query.shape[2] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(dim=2).mean(dim=1)


def select_words(scores: Tensor, end: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The words that the end of text attends to most, filled up with padding.

    Args:
        scores: (B, L), attention of the end of text.
        end: int64 (B,), where it is; words are between position 0 and it.
        k: most words.

    Returns:
        Positions (B, k), or (B, L) where L is less, and how many of them, (B,), are words. A caption without words has
        its end of text in their place (the reference goes on with NaN).
    """
    position = torch.arange(scores.shape[1], device=scores.device)
    words = (position > 0) & (position < end[:, None])
    rank = torch.where(words, scores, torch.where(position > end[:, None], 0.0, -1.0))
    chosen, count = rank.topk(min(k, scores.shape[1])).indices, words.sum(dim=1)
    chosen = torch.cat([torch.where(count == 0, end, chosen[:, 0])[:, None], chosen[:, 1:]], dim=1)
    return chosen, count.clamp(min=1, max=k)


def gather(tokens: Tensor, positions: Tensor) -> Tensor:
    """(B, T, D) at (B, k) -> (B, k, D)."""
    return tokens.gather(1, positions[:, :, None].expand(-1, -1, tokens.shape[2]))
