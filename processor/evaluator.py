"""Evaluation: encode the gallery and the queries of a split once, then rank by cosine similarity in chunks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.annotations import Record
from datasets.loaders import EvalLoaders
from datasets.pairs import Pair, pairs_of
from model.encoders import Encoded, Encoder
from utils.batch import Batch, to_device
from utils.distributed import gather_objects, world_size
from utils.errors import DataError, TrainingError
from utils.logger import LOGGER, format_table, progress
from utils.metrics import METRICS, Ranking, rank_queries, similarity_chunks
from utils.precision import autocast

COLLAPSED = 0.999  # mean cosine similarity; untrained towers stay below


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of a split, float32: images (G, D) with their records, captions (Q, D) with their pairs."""

    gallery: Tensor
    query: Tensor
    records: Sequence[Record]  # of the gallery, without skipped images
    pairs: Sequence[Pair]  # of the queries

    @property
    def gallery_pids(self) -> Tensor:
        """Raw pids, int64 (G,)."""
        return torch.tensor([record.pid for record in self.records])

    @property
    def query_pids(self) -> Tensor:
        """Raw pids, int64 (Q,)."""
        return torch.tensor([pair.record.pid for pair in self.pairs])

    def split(self, dimensions: Mapping[str, int]) -> dict[str, "Embeddings"]:
        """Name -> each of the encoder's embeddings alone.

        Args:
            dimensions: `Encoder.embeddings`.
        """
        sizes = list(dimensions.values())
        sides = zip(self.gallery.split(sizes, dim=1), self.query.split(sizes, dim=1), strict=True)
        return {
            name: Embeddings(F.normalize(gallery), F.normalize(query), self.records, self.pairs)
            for name, (gallery, query) in zip(dimensions, sides, strict=True)
        }

    def rank_images(self) -> Ranking:
        """Text-to-image: every caption ranks the images."""
        return _rank(self.query, self.gallery, self.query_pids, self.gallery_pids)

    def rank_captions(self) -> Ranking:
        """Image-to-text: every image ranks the captions."""
        return _rank(self.gallery, self.query, self.gallery_pids, self.query_pids)


@torch.no_grad()
def embed(
    encoder: Encoder,
    loaders: EvalLoaders,
    device: torch.device,
    precision: str,
    passes: Callable[..., Any] | None = None,
    dummy: Batch | None = None,
) -> Embeddings:
    """Encode a split in evaluation mode; restores the encoder's mode afterwards.

    Embeddings stay on `device`. Skipped gallery images are reported.

    Args:
        encoder: encoder on `device`.
        loaders: batches of the split.
        device: device of the forward passes.
        precision: autocast precision.
        passes: forward passes of the encoder, see processor/passes.py; None calls it directly.
        dummy: batch for the passes that only other processes need; None if passes are local.

    Raises:
        DataError: an image cannot be read, or none can with `data.on_bad_image: skip`.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        with autocast(device, precision):
            encode = partial(_encode, device=device, passes=passes, dummy=dummy)
            images = encode(encoder.encode_image, "images", loaders.gallery, "gallery")
            captions = encode(encoder.encode_text, "caption_ids", loaders.query, "queries")
    finally:
        encoder.train(was_training)
    skipped = [path for paths in gather_objects(loaders.images.unreadable()) for path in paths]
    if skipped:
        LOGGER.warning("skipped %d unreadable gallery images: %s", len(skipped), ", ".join(skipped[:5]))
    images, captions = _of_all_processes(images, device), _of_all_processes(captions, device)
    if not images:
        raise DataError(f"{skipped[0]}: unreadable image, like all others of the gallery")
    records = [record for record in loaders.records if record.image_path not in set(skipped)]
    gallery, query = F.normalize(torch.cat(images)), F.normalize(torch.cat(captions))
    return Embeddings(gallery, query, records, pairs_of(loaders.records))


def _encode(
    function: Callable[[Tensor], Encoded],
    field: str,
    loader: DataLoader[Batch],
    what: str,
    *,
    device: torch.device,
    passes: Callable[..., Any] | None,
    dummy: Batch | None,
) -> list[Tensor]:
    """Embeddings of all batches of this process. With a dummy, all processes run the same number of passes."""
    number = len(loader) if dummy is None else max(gather_objects(len(loader)))
    rows = []
    for batch in chain(batches(loader, what, device), repeat({}, number - len(loader))):
        if batch:  # empty if all its images are skipped
            rows.append((function(batch[field]) if passes is None else passes(function, batch[field])).joint)
        elif dummy is not None and passes is not None:
            passes(function, dummy[field])
    return rows


def _of_all_processes(local: list[Tensor], device: torch.device) -> list[Tensor]:
    if world_size() == 1:
        return local
    on_cpu = [torch.cat(local).cpu()] if local else []  # one copy, since each makes the host wait
    return [rows.to(device) for process in gather_objects(on_cpu) for rows in process]


def metrics_table(rows: dict[str, dict[str, float]], first: str = "task") -> str:
    """The field's result table: one row per name, in percent."""
    return format_table([first, *METRICS], [[name, *(values[key] for key in METRICS)] for name, values in rows.items()])


def warn(embeddings: Embeddings, ranking: Ranking, split: str) -> None:
    """Log the number of queries that no metric counts, and embeddings that are (nearly) all alike.

    Args:
        embeddings: embeddings of the split.
        ranking: their text-to-image ranking.
        split: name of the split.
    """
    if ranking.num_unmatched:
        LOGGER.warning("%s: skipped %d captions whose identity is not in the gallery", split, ranking.num_unmatched)
    for vectors, name in ((embeddings.gallery, "images"), (embeddings.query, "captions")):
        zero = int((vectors.norm(dim=1) < 0.5).sum())  # normalisation leaves zero vectors as they are
        cosine = mean_cosine(vectors)
        if zero or cosine > COLLAPSED:
            LOGGER.warning(
                "%s: collapsed model: the mean cosine similarity of two %s is %.4f, and %d of %d embeddings are "
                "zero, so these metrics are those of ties and rounding; check the weights, or lower solver.lr",
                *(split, name, cosine, zero, len(vectors)),
            )


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine similarity over all pairs of different rows.

    Args:
        vectors: unit vectors (N, D), N of at least 2; one row alone gives 0.
    """
    total, rows = vectors.double().sum(dim=0), len(vectors)
    return float((total @ total - vectors.double().square().sum()) / max(1, rows * (rows - 1)))


def _rank(query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> Ranking:
    if not (query.isfinite().all() and gallery.isfinite().all()):
        raise TrainingError("embeddings are not finite: the model has diverged, or its checkpoint is damaged")
    return rank_queries(similarity_chunks(query, gallery), query_pids, gallery_pids)


def batches(loader: DataLoader[Batch], what: str, device: torch.device) -> Iterator[Batch]:
    """The loader's batches on `device`, with a progress bar."""
    for batch in progress(loader, f"embedding {what}"):
        yield to_device(batch, device)
