"""Interface of a loss: its input, and the batch fields, flags and hooks to declare."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from torch import Tensor, nn

from utils.batch import Batch
from utils.options import Option
from utils.registry import Registry

Reduction = Literal["mean", "none"]
Weight = Annotated[float, Option(ge=0)]
Margin = Annotated[float, Option(ge=0)]


def reduce(per_pair: Tensor, reduction: Reduction) -> Tensor:
    """The mean of losses (B,), or the losses themselves."""
    return per_pair.mean() if reduction == "mean" else per_pair


@dataclass(frozen=True)
class Metadata:
    """Facts about data and encoder, the positional argument of objectives."""

    num_pids: int
    embed_dim: int
    vocab_size: int
    noise_rate: float = 0.0  # data.noise_rate
    dataset: str = ""  # data.dataset


class MaskedMean(NamedTuple):
    """A mean over some rows of the batch, for the log: their sum and their number, both scalar."""

    total: Tensor
    number: Tensor


Metrics: TypeAlias = dict[str, Tensor | MaskedMean]


class Tokens(NamedTuple):
    """Token-level outputs of both towers for the micro-batch of this process (b rows)."""

    image: Tensor  # (b, 1 + N, D), class token first
    texts: Mapping[str, Tensor]  # batch field of token ids -> tokens (b, L, D)
    caption_field: str = "caption_ids"  # the field that losses read their captions from


@dataclass(frozen=True)
class Step:
    """One training step as an objective sees it (B rows, D dimensions, N patches, L columns of text).

    Embeddings, pids, the teacher's embeddings and the batch fields with one value per row are gathered over processes
    and micro-batches. Tokens and all other fields are those of one micro-batch of this process.
    """

    embeddings: tuple[tuple[Tensor, Tensor], ...]  # image and text, float32 (B, D) each, not normalised
    pids: Tensor  # int64 (B,)
    logit_scale: float = 1.0
    tokens: Tokens | None = None  # None where only embeddings are gathered
    teacher: tuple[Tensor, Tensor] | None = None  # image and text, float32 (B, D') each, constant
    batch: Batch = field(default_factory=dict)

    @classmethod
    def from_embeddings(cls, image: Tensor, text: Tensor, pids: Tensor, **more: Any) -> "Step":
        """A step of an encoder with one embedding per modality; `more` are other fields of `Step`."""
        return cls(((image, text),), pids, **more)

    @property
    def image(self) -> Tensor:
        """Main image embedding (B, D)."""
        return self.embeddings[0][0]

    @property
    def text(self) -> Tensor:
        """Main text embedding (B, D)."""
        return self.embeddings[0][1]

    @property
    def image_tokens(self) -> Tensor:
        """Image tokens (b, 1 + N, D), class token first."""
        return self._tokens.image

    @property
    def text_tokens(self) -> Tensor:
        """Text tokens (b, L, D) of the captions encoded by `text`."""
        return self._tokens.texts[self._tokens.caption_field]

    @property
    def texts(self) -> Mapping[str, Tensor]:
        """Batch field of token ids -> text tokens (b, L, D)."""
        return self._tokens.texts

    @property
    def caption_ids(self) -> Tensor:
        """Token ids (b, L) of the captions encoded by `text`."""
        return self.batch[self._tokens.caption_field]

    @property
    def _tokens(self) -> Tokens:
        if self.tokens is None:
            raise RuntimeError("this step has no tokens; an objective that reads them must set reads_tokens = True")
        return self.tokens


class EpochContext(Protocol):
    """Access to the training pairs before an epoch."""

    epoch: int
    clean: np.ndarray  # bool (N,), False for training pairs whose caption noise replaced

    def pair_losses(self, objective: "Objective") -> tuple[Tensor, Tensor]:
        """Losses (K, N) of all training pairs in evaluation mode, and the mask (N,) of pairs with a loss."""

    def rng(self) -> np.random.Generator:
        """A generator seeded by the run's seed and the epoch."""


class Objective(nn.Module):
    """A loss with the parameters that only it needs.

    A subclass takes the metadata and, keyword-only, the options that YAML may set, `weight` among them. Its `forward`
    maps a step to the unweighted loss and to metrics for the log. The loss's name is put in front of those that are a
    `MaskedMean`.

    Args:
        weight: weight of the loss; 0 only logs it.
    """

    inputs: ClassVar[frozenset[str]] = frozenset()  # batch fields beyond images, captions and pids
    text_fields: ClassVar[frozenset[str]] = frozenset()  # batch fields of token ids that the text tower must encode
    needs_teacher: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False  # reads all tokens of both towers; its mean is over terms of a micro-batch
    autocast: ClassVar[bool] = False  # runs in the encoder's precision instead of fp32
    full_text: bool = False  # needs text padded to full length
    captions_from: str | None = None  # caption field that all losses must use (overrides caption_ids)

    def __init__(self, *, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def count(self, batch: Batch) -> int:
        """Number of terms in the mean over a micro-batch, for objectives with `reads_tokens`."""
        return len(batch["pids"])

    def before_epoch(self, context: EpochContext) -> dict[str, float]:
        """Hook before each epoch; returns metrics for the log and metrics.jsonl."""
        return {}

    def training_state(self) -> dict[str, Tensor]:
        """State besides the weights, for resumed runs."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `training_state`."""

    def forward(self, step: Step) -> tuple[Tensor, Metrics]:
        raise NotImplementedError


OBJECTIVES: Registry[type[Objective]] = Registry("loss")
