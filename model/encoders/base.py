"""What every encoder offers to the task and the evaluator."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from utils.registry import Registry


class Encoded(NamedTuple):
    """Embeddings (B, D), not normalised, and all projected tokens (B, T, D)."""

    embedding: Tensor
    tokens: Tensor


class Encoder(nn.Module, ABC):
    """Encodes both modalities into one space of `embed_dim` dimensions.

    A subclass takes (image_size, text_length, pretrained) and, keyword-only, the options a YAML may set under `model`.
    `logit_scale` (1/temperature, constant) multiplies cosine similarities in the losses; `vocab_size` bounds token ids.
    """

    embed_dim: int
    vocab_size: int
    logit_scale: float
    notes: tuple[str, ...] = ()  # what a log should say about how it was built
    tokenizers: ClassVar[tuple[str, ...]] = ("clip",)  # the kinds of token ids that it understands
    drops_tokens: bool = False  # its tokens are not all there in training

    @abstractmethod
    def encode_image(self, images: Tensor) -> Encoded:
        """float (B, 3, H, W) -> embeddings (B, D) and tokens (B, 1 + N, D), the class token first."""

    @abstractmethod
    def encode_text(self, caption_ids: Tensor) -> Encoded:
        """int64 (B, L) -> embeddings (B, D) and tokens (B, L, D)."""

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
