"""What an objective is given, and what it owes: the one interface between the task and its losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from utils.batch import Batch
from utils.registry import Registry

Reduction = Literal["mean", "none"]


def reduce(per_pair: Tensor, reduction: Reduction) -> Tensor:
    """(B,) -> its mean, or itself."""
    return per_pair.mean() if reduction == "mean" else per_pair


@dataclass(frozen=True)
class Facts:
    """What is known when the objectives are built: their positional argument."""

    num_pids: int
    embed_dim: int
    vocab_size: int
    noise_rate: float = 0.0  # of data.noise_rate
    dataset: str = ""


class PartMean(NamedTuple):
    """For the log, a mean over some pairs of the batch: their sum and their number, both scalar."""

    total: Tensor
    number: Tensor


Values: TypeAlias = dict[str, Tensor | PartMean]


@dataclass(frozen=True)
class Step:
    """One training step as every objective sees it (B pairs, D dimensions, N patches, L columns of text).

    Where several processes train, embeddings, pids, teacher, and the batch's index and clean flags are those of the
    whole batch, and all else is of the `b` rows of this process. Where a batch is trained in parts (train.accumulate),
    objectives that read tokens see nothing but a part, and the others nothing but what is of the whole batch.
    """

    embeddings: tuple[tuple[Tensor, Tensor], ...]  # of image and text, float32 (B, D) each, not normalised
    pids: Tensor  # int64 (B,)
    logit_scale: float
    image_tokens: Tensor  # (b, 1 + N, D)
    caption_ids: Tensor  # int64 (b, L), the captions of `text`
    text_tokens: Tensor  # (b, L, D), theirs
    teacher: tuple[Tensor, Tensor] | None  # its embeddings of image and text, float32 (B, D') each, constant
    texts: Mapping[str, Tensor]  # batch field of token ids -> their tokens (b, L, D)
    batch: Batch

    @property
    def image(self) -> Tensor:
        """The main embedding, where the encoder has several."""
        return self.embeddings[0][0]

    @property
    def text(self) -> Tensor:
        return self.embeddings[0][1]


class Objective(nn.Module):
    """A loss with the parameters that only it needs.

    A subclass takes the facts and, keyword-only, the options that a YAML may set, `weight` among them. Its forward
    maps a Step to the unweighted loss and to further values for the log; the names of those that are a `PartMean`
    get the loss's name in front.
    """

    inputs: ClassVar[frozenset[str]] = frozenset()  # batch fields beyond images, captions and pids
    text_fields: ClassVar[frozenset[str]] = frozenset()  # batch fields of token ids that the text tower must encode
    needs_teacher: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False  # of both towers, all of them; a mean over things of the rows that it sees
    autocast: ClassVar[bool] = False  # runs in the precision of the encoder; losses themselves are fp32
    full_text: bool = False  # wants text of all columns, not only up to the longest caption
    captions_from: str | None = None  # the batch field that *every* loss shall read its captions from

    def __init__(self, *, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def count(self, batch: Batch) -> int:
        """How many things of a batch the mean of an objective that reads tokens is over."""
        return len(batch["pids"])

    def forward(self, step: Step) -> tuple[Tensor, Values]:
        raise NotImplementedError


OBJECTIVES: Registry[type[Objective]] = Registry("loss")
