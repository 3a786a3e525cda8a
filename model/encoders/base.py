"""Interface of an encoder, as the task and the evaluator use it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoints.grids import PatchGrid
from utils.batch import Batch
from utils.registry import Registry


class Encoded(NamedTuple):
    """Embeddings (B, D), not normalised, and all projected tokens (B, T, D)."""

    embedding: Tensor
    tokens: Tensor
    more: tuple[Tensor, ...] = ()  # further embeddings (B, D'), in the order of `Encoder.embeddings`

    @property
    def embeddings(self) -> tuple[Tensor, ...]:
        """The main embedding and the further ones."""
        return (self.embedding, *self.more)

    @property
    def joint(self) -> Tensor:
        """All embeddings in one vector, float32 (B, sum of D).

        Its cosine similarity is the mean of the cosine similarities of all embeddings.
        """
        if not self.more:
            return self.embedding.float()
        return torch.cat([F.normalize(embedding.float()) for embedding in self.embeddings], dim=1)


class Encoder(nn.Module, ABC):
    """Encodes both modalities into one space of `embed_dim` dimensions.

    A subclass takes `image_size` (height and width in pixels), `text_length` (largest number of columns), `pretrained`
    (False leaves out pretrained weights) and, keyword-only, the options that YAML may set under `model`. The constant
    `logit_scale` (1/temperature) multiplies cosine similarities in the losses.
    """

    tokenizers: ClassVar[tuple[str, ...]] = ("clip",)  # supported kinds of token ids
    optional_modules: ClassVar[tuple[str, ...]] = ()  # name prefixes of modules that a checkpoint may lack
    teaches_itself: ClassVar[bool] = False  # the last embedding of `relate` is a teacher of the main one

    embed_dim: int
    vocab_size: int  # upper bound of token ids
    logit_scale: float
    embeddings: Mapping[str, int] = MappingProxyType({})  # name -> dimensions, if the encoder has several embeddings
    notes: tuple[str, ...] = ()  # remarks about the construction, for the log
    full_text: bool = False  # needs text padded to full length
    inputs: frozenset[str] = frozenset()  # batch fields that `enrich` and `relate` read
    why_no_tokens: str | None = None  # reason and remedy if tokens are incomplete in training
    why_not_accumulate: str | None = None  # reason and remedy if a batch cannot be encoded in micro-batches
    why_not_shard: str | None = None  # reason and remedy if the parameters cannot be sharded over processes

    @abstractmethod
    def encode_image(self, images: Tensor) -> Encoded:
        """Images float (B, 3, H, W) -> embeddings (B, D) and tokens (B, 1 + N, D), class token first."""

    @abstractmethod
    def encode_text(self, caption_ids: Tensor) -> Encoded:
        """Token ids int64 (B, L) -> embeddings (B, D) and tokens (B, L, D)."""

    def enrich(self, image: Encoded, text: Encoded, batch: Batch) -> tuple[Encoded, Encoded]:
        """Hook in training: replace the embeddings of a local micro-batch, e.g. by fusing support sets."""
        return image, text

    def relate(self, image: Tensor, text: Tensor, rows: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Hook in training: further (image, text) embeddings computed from all rows of the global batch.

        Args:
            image: gathered main embeddings (B, D).
            text: gathered main embeddings (B, D).
            rows: gathered batch fields with one value per row.
        """
        return ()

    def compile_towers(self) -> None:
        """Apply torch.compile to the towers."""
        for tower in self.children():
            tower.compile()

    @property
    def blocks(self) -> list[nn.Module]:
        """Repeated modules of the towers, which `train.shard` gathers one at a time. Only `forward` may use them."""
        found: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for module in self.modules():
            if module in inside or not isinstance(module, nn.ModuleList | nn.Sequential):
                continue
            if len({type(block) for block in module}) == 1 and any(True for _ in module.parameters()):
                found += list(module)
                inside.update(module.modules())
        return found

    def patches(self, name: str) -> PatchGrid | None:
        """The patches whose positions a tensor of the state dict holds; None if it holds something else."""
        return None

    @property
    def activations(self) -> Mapping[str, str]:
        """Tower (image, text) -> activation of its MLPs, by timm's name."""
        return {}


ENCODERS: Registry[type[Encoder]] = Registry("encoder")
