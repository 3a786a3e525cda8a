"""Embed a split's gallery and queries once, then rank by cosine similarity, a few queries at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.loaders import EvalLoaders
from model.encoders import Encoder
from utils.batch import Batch, to_device
from utils.distributed import gather_objects, world_size
from utils.errors import DataError, TrainingError
from utils.logger import LOGGER, format_table, progress
from utils.metrics import Ranking, rank_queries, similarity_chunks
from utils.precision import autocast

METRICS = ("R1", "R5", "R10", "mAP", "mINP")


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of a split: gallery (G, D) and query (Q, D), float32, and their raw pids."""

    gallery: Tensor
    query: Tensor
    gallery_pids: Tensor
    query_pids: Tensor

    def parts(self, dimensions: Mapping[str, int]) -> dict[str, "Embeddings"]:
        """Each of an encoder's several embeddings by itself; `dimensions` is its `Encoder.embeddings`."""
        pieces = zip(
            *(side.split(list(dimensions.values()), dim=1) for side in (self.gallery, self.query)), strict=True
        )
        return {
            name: Embeddings(F.normalize(gallery), F.normalize(query), self.gallery_pids, self.query_pids)
            for name, (gallery, query) in zip(dimensions, pieces, strict=True)
        }

    def rank_images(self) -> Ranking:
        """Text-to-image: every caption ranks the images."""
        return _rank(self.query, self.gallery, self.query_pids, self.gallery_pids)

    def rank_captions(self) -> Ranking:
        """Image-to-text: every image ranks the captions."""
        return _rank(self.gallery, self.query, self.gallery_pids, self.query_pids)


@torch.no_grad()
def embed(encoder: Encoder, loaders: EvalLoaders, device: torch.device, precision: str) -> Embeddings:
    """Encode a split in evaluation mode; the encoder's mode is put back afterwards.

    Embeddings stay on `device`. Gallery images that are skipped because they cannot be read are reported.

    Raises:
        DataError: an image cannot be read; with `data.on_bad_image: skip`, none can.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        with autocast(device, precision):
            images = [
                (encoder.encode_image(batch["images"]).joint, batch["pids"])
                for batch in batches(loaders.gallery, "gallery", device)
                if batch  # a whole batch of skipped images is empty
            ]
            captions = [
                (encoder.encode_text(batch["caption_ids"]).joint, batch["pids"])
                for batch in batches(loaders.query, "queries", device)
            ]
    finally:
        encoder.train(was_training)
    skipped = [path for part in gather_objects(loaders.images.unreadable()) for path in part]
    if skipped:
        LOGGER.warning("%d images cannot be read and are not in the gallery: %s", len(skipped), ", ".join(skipped[:5]))
    images, captions = _whole(images, device), _whole(captions, device)
    if not images:
        raise DataError(f"{skipped[0]}: cannot be read, and neither can any other gallery image")
    (gallery, gallery_pids), (query, query_pids) = (
        map(torch.cat, zip(*part, strict=True)) for part in (images, captions)
    )
    return Embeddings(F.normalize(gallery), F.normalize(query), gallery_pids, query_pids)


def _whole(pieces: list[tuple[Tensor, Tensor]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The embeddings and pids of the batches of all processes, in order."""
    if world_size() == 1:
        return pieces
    on_cpu = [(embeddings.cpu(), pids.cpu()) for embeddings, pids in pieces]
    return [(embeddings.to(device), pids.to(device)) for part in gather_objects(on_cpu) for embeddings, pids in part]


def metrics_table(rows: dict[str, dict[str, float]], first: str = "task") -> str:
    """The field's result table: one row per name, in percent."""
    return format_table([first, *METRICS], [[name, *(values[key] for key in METRICS)] for name, values in rows.items()])


def _rank(query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> Ranking:
    if not (query.isfinite().all() and gallery.isfinite().all()):
        raise TrainingError("the embeddings are not finite: the model has diverged, or its checkpoint is damaged")
    return rank_queries(similarity_chunks(query, gallery), query_pids, gallery_pids)


def batches(loader: DataLoader[Batch], what: str, device: torch.device) -> Iterator[Batch]:
    """The loader's batches on `device`, with a bar."""
    for batch in progress(loader, f"embedding {what}"):
        yield to_device(batch, device)
