"""What the towers make of a batch or of a part of one, and how the parts that lie elsewhere or come later join it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.encoders import Encoded
from utils.batch import Batch
from utils.distributed import gather, rank

ROW_FIELDS = ("pids", "clean", "image_ids")  # one value for each row
ABSENT = torch.empty(0, device="meta")  # any use of it together with real values is an error


class Read(NamedTuple):
    """A batch, or a part of it, behind the towers (b rows)."""

    image: Encoded
    captions: Encoded
    texts: Mapping[str, Tensor]  # batch field of token ids -> their tokens (b, L, D)
    teacher: tuple[Tensor, Tensor] | None  # its embeddings of image and text (b, D')

    @property
    def embeddings(self) -> tuple[Tensor, ...]:
        """All of the images', then all of the captions'."""
        return (self.image.embedding, *self.image.more, self.captions.embedding, *self.captions.more)


def own_rows(batch: Batch) -> int:
    """The rows that are not a stand-in for another process's."""
    rows = len(batch["pids"])
    return rows if "shards" not in batch else rows // len(batch["index"]) * int(batch["shards"][rank()])


def join(reads: Sequence[Read], parts: Sequence[Batch]) -> tuple[Read, Batch]:
    """The parts of a batch as one: embeddings, which are leaves of a new graph, and one value a row; no tokens."""
    rows, pairs = [own_rows(part) for part in parts], [int(part["shards"][rank()]) for part in parts]
    if not sum(rows):  # all are stand-ins: one of them shall still show what a pair looks like
        rows[0], pairs[0] = len(parts[0]["pids"]), len(parts[0]["index"])

    def joined(pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat([piece[:number] for piece, number in zip(pieces, rows, strict=True)])

    embeddings = [joined(pieces).requires_grad_() for pieces in zip(*(read.embeddings for read in reads), strict=True)]
    half = len(embeddings) // 2
    image, captions = (Encoded(side[0], ABSENT, tuple(side[1:])) for side in (embeddings[:half], embeddings[half:]))
    taught = [read.teacher for read in reads if read.teacher is not None]
    teacher = (joined([image for image, _ in taught]), joined([text for _, text in taught])) if taught else None
    batch = {name: joined([part[name] for part in parts]) for name in ROW_FIELDS if name in parts[0]}
    batch["index"] = torch.cat([part["index"][:number] for part, number in zip(parts, pairs, strict=True)])
    batch["shards"] = torch.stack([part["shards"] for part in parts]).sum(dim=0)
    return Read(image, captions, dict.fromkeys(reads[0].texts, ABSENT), teacher), batch


class Whole:
    """Puts the rows of all processes together, with their gradient; with one process they are whole already."""

    def __init__(self, batch: Batch) -> None:
        self.sizes: list[int] | None = None  # rows of each process
        if "shards" in batch:
            self.pairs = batch["shards"].tolist()
            views = len(batch["pids"]) // len(batch["index"])  # rows of a pair
            self.sizes = [views * pairs for pairs in self.pairs]

    def rows(self, local: Tensor) -> Tensor:
        return local if self.sizes is None else gather(local[: self.sizes[rank()]], self.sizes)

    def fields(self, batch: Batch) -> Batch:
        """The batch with those of its fields that go with the embeddings whole."""
        whole = {name: self.rows(batch[name]) for name in ROW_FIELDS if name in batch}
        if self.sizes is not None:
            whole["index"] = gather(batch["index"][: self.pairs[rank()]], self.pairs)
        return batch | whole

    def encoded(self, local: Encoded) -> Encoded:
        """Whole embeddings; the tokens stay this process's."""
        return Encoded(self.rows(local.embedding), local.tokens, tuple(self.rows(part) for part in local.more))
