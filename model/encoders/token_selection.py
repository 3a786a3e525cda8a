"""CLIP's encoder with a second embedding, pooled from the tokens with the most attention in the last block (RDE)."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoders.base import ENCODERS, Encoded
from model.encoders.clip import CLIPEncoder
from utils.batch import end_of_text
from utils.errors import ConfigError
from utils.options import Option


@ENCODERS.register("token_selection")
class TokenSelectionEncoder(CLIPEncoder):
    """RDE's dual embedding (Qin et al., CVPR 2024, https://arxiv.org/abs/2308.09911, section 3.2).

    One embedding is CLIP's (bge), the other pools selected tokens (tse), see docs/methods/rde.md#token-selection.

    Args:
        selected_dim: dimensions of the second embedding.
        ratio: fraction of the patches, and of the words that `text_length` has room for, that are selected.
        bn: frozen normalises by running statistics that never change, as when the published numbers were made; batch
            is ordinary batch normalisation, as in the authors' repository since October 2024.
        clip: options of `CLIPEncoder`.
    """

    optional_modules = ("selection.",)

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        selected_dim: Annotated[int, Option(ge=2, le=1_000_000)] = 1024,
        ratio: Annotated[float, Option(gt=0, le=1)] = 0.3,
        bn: Literal["frozen", "batch"] = "frozen",
        **clip: Any,
    ) -> None:
        super().__init__(image_size, text_length, pretrained, **clip)
        if not self.image.has_class_token:
            raise ConfigError("model.image.arch: must have a class token, whose attention selects the patches")
        self.embeddings = {"bge": self.embed_dim, "tse": selected_dim}
        self.num_patches = max(1, int(self.image.trunk.patch_embed.num_patches * ratio))
        self.num_words = max(1, int((text_length - 2) * ratio))
        if bn == "batch":
            self.why_not_accumulate = "batch normalisation needs the whole batch; set model.bn=frozen"
        self.full_text = bn == "batch"  # the batch statistics include padding
        self.selection = nn.ModuleDict(
            {tower: TokenMLP(self.embed_dim, selected_dim, bn == "frozen") for tower in ("image", "text")}
        )
        last = self.image.trunk.blocks[-1].attn
        self.image_attention = LastAttention(last.q_norm, last.k_norm)  # behind the split into heads
        last = self.text.trunk.encoder.layers[-1].self_attn
        self.text_attention = LastAttention(last.q_proj, last.k_proj)
        self.text_heads: int = last.num_heads

    def encode_image(self, images: Tensor) -> Encoded:
        embedding, tokens, _ = super().encode_image(images)
        query, keys = self.image_attention.take()
        scores = attention(query[:, :, 0], keys)[:, 1:]
        chosen = 1 + scores.topk(self.num_patches).indices
        return Encoded(embedding, tokens, (self.selection["image"](select(tokens, chosen)),))

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        embedding, tokens, _ = super().encode_text(caption_ids)
        query, keys = (part.unflatten(2, (self.text_heads, -1)).transpose(1, 2) for part in self.text_attention.take())
        end = end_of_text(caption_ids)
        last = end[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3])
        seen = torch.arange(query.shape[2], device=end.device) <= end[:, None]
        scores = attention(query.gather(2, last).squeeze(2), keys, seen)
        chosen, count = select_words(scores, end, self.num_words)
        return Encoded(embedding, tokens, (self.selection["text"](select(tokens, chosen), count),))


class TokenMLP(nn.Module):
    """Pool tokens (B, k, D) -> (B, D'): a residual MLP on unit tokens, then the maximum over tokens.

    Args:
        embed_dim: D.
        selected_dim: D'.
        frozen: never update the running statistics of batch normalisation.
    """

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
        """Pool tokens.

        Args:
            tokens: (B, k, D).
            count: (B,), number of tokens to pool, the first ones; None pools all.
        """
        tokens = tokens / (tokens.norm(dim=-1, keepdim=True) + 1e-8)
        hidden = self.norm(self.hidden(tokens).flatten(0, 1)).unflatten(0, tokens.shape[:2])
        values = self.out(F.relu(hidden)) + self.skip(tokens)
        if count is not None:
            unused = torch.arange(tokens.shape[1], device=count.device) >= count[:, None]
            values = values.masked_fill(unused[:, :, None], -torch.inf)
        pooled: Tensor = values.max(dim=1).values
        return pooled


class LastAttention:
    """Queries and keys of the latest forward pass of an attention layer, without gradient.

    Args:
        query: module whose output are the queries.
        keys: module whose output are the keys.
    """

    def __init__(self, query: nn.Module, keys: nn.Module) -> None:
        self.query: Tensor | None = None
        self.keys: Tensor | None = None
        query.register_forward_hook(self._keep_query)
        keys.register_forward_hook(self._keep_keys)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return and release the queries and keys."""
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
        query: (B, heads, d), query of the position.
        keys: (B, heads, N, d).
        seen: bool (B, N), positions that it may attend to; None allows all.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = (keys.float() @ query.float()[..., None]).squeeze(3) * query.shape[2] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights: Tensor = scores.softmax(dim=2).mean(dim=1)
    return weights


def select_words(scores: Tensor, end: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the words with the most attention from the end of text, padded to k.

    A caption without words has its end of text in their place, where the reference continues with NaN.

    Args:
        scores: (B, L), attention of the end of text.
        end: int64 (B,), position of the end of text; words lie between position 0 and it.
        k: number of words to select.

    Returns:
        Positions (B, min(k, L)), and the number of words among them (B,).
    """
    position = torch.arange(scores.shape[1], device=scores.device)
    words = (position > 0) & (position < end[:, None])
    rank = torch.where(words, scores, torch.where(position > end[:, None], 0.0, -1.0))
    chosen, count = rank.topk(min(k, scores.shape[1])).indices, words.sum(dim=1)
    chosen = torch.cat([torch.where(count == 0, end, chosen[:, 0])[:, None], chosen[:, 1:]], dim=1)
    return chosen, count.clamp(min=1, max=k)


def select(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens (B, T, D) at positions (B, k) -> (B, k, D)."""
    return tokens.gather(1, positions[:, :, None].expand(-1, -1, tokens.shape[2]))
