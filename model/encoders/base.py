"""What every encoder offers to the task and the evaluator."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.batch import Batch
from utils.registry import Registry


class Encoded(NamedTuple):
    """Embeddings (B, D), not normalised, and all projected tokens (B, T, D).

    `more` holds the further embeddings (B, D') of an encoder that has them, in the order of `Encoder.embeddings`.
    """

    embedding: Tensor
    tokens: Tensor
    more: tuple[Tensor, ...] = ()

    @property
    def joint(self) -> Tensor:
        """(B, sum of D), float32: its cosine similarity is the mean of all embeddings' cosine similarities."""
        if not self.more:
            return self.embedding.float()
        return torch.cat([F.normalize(embedding.float()) for embedding in (self.embedding, *self.more)], dim=1)


class Encoder(nn.Module, ABC):
    """Encodes both modalities into one space of `embed_dim` dimensions.

    A subclass takes (image_size, text_length, pretrained) and, keyword-only, the options a YAML may set under `model`.
    `logit_scale` (1/temperature, constant) multiplies cosine similarities in the losses; `vocab_size` bounds token ids.
    """

    embed_dim: int
    vocab_size: int
    logit_scale: float
    embeddings: Mapping[str, int] = MappingProxyType({})  # name -> dimensions of each, where there are several
    notes: tuple[str, ...] = ()  # what a log should say about how it was built
    tokenizers: ClassVar[tuple[str, ...]] = ("clip",)  # the kinds of token ids that it understands
    full_text: bool = False  # wants text of all columns, not only up to the longest caption
    inputs: frozenset[str] = frozenset()  # batch fields that `enrich` reads
    teaches: ClassVar[bool] = False  # its last embedding is a teacher of its first
    drops_tokens: bool = False  # its tokens are not all there in training
    batch_statistics: bool = False  # in training, an embedding depends on the other rows that are encoded with it

    @abstractmethod
    def encode_image(self, images: Tensor) -> Encoded:
        """float (B, 3, H, W) -> embeddings (B, D) and tokens (B, 1 + N, D), the class token first."""

    @abstractmethod
    def encode_text(self, caption_ids: Tensor) -> Encoded:
        """int64 (B, L) -> embeddings (B, D) and tokens (B, L, D)."""

    def enrich(self, image: Encoded, text: Encoded, batch: Batch) -> tuple[Encoded, Encoded]:
        """In training, what the losses see in place of the encoded images and captions of a batch."""
        return image, text

    def compile_towers(self) -> None:
        """torch.compile what takes the time."""
        for tower in self.children():
            tower.compile()

    def resize(self, name: str, value: Tensor) -> Tensor | None:
        """A checkpoint's position grid made for another image size, resized to this encoder's; None: no such tensor.

        Args:
            name: in this encoder's state dict.

        Raises:
            ValueError: the shape of the grid that it was made for cannot be known.
        """
        return None


ENCODERS: Registry[type[Encoder]] = Registry("encoder")
