"""Time and peak memory of the streamed ranking beside the bare matrix product and a full argsort; Linux, CPU."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.profiling import in_fresh_process, measured
from benchmarks.common.rounds import interleaved
from configs.arguments import positive
from utils.distributed import default_device, describe_device
from utils.exit import exit_on_user_error
from utils.metrics import METRICS, similarity_chunks, streamed_metrics

DIM = 512


class Size(NamedTuple):
    """Identities, images and captions per image of a test split; spread of the images per identity."""

    identities: int
    images: int
    captions: int
    spread: float  # standard deviation of the logarithm


SIZES = {
    "cuhk": Size(1000, 3074, 2, 0.0),
    "icfg": Size(1000, 19_848, 1, 0.35),
    "large": Size(50_000, 1_000_000, 1, 0.35),
}
LARGE_QUERIES = 10_000
# A trained model's embedding: noise, and an identity within a few dimensions. R@1, mAP and mINP are then near those of
# published models.
IDENTITY, IDENTITY_DIM = 0.4, 8


def split(name: str, trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, gallery, query_pids and gallery_pids; captions and images in annotation order, as in the data sets.

    Args:
        name: one of SIZES.
        trained: embeddings like a trained model's instead of random ones.
    """
    torch.manual_seed(0)
    size = SIZES[name]
    weights = torch.exp(size.spread * torch.randn(size.identities))
    others = torch.multinomial(weights, size.images - size.identities, replacement=True)
    gallery_pids = torch.cat([torch.arange(size.identities), others]).sort().values
    query_pids = gallery_pids.repeat_interleave(size.captions)
    if name == "large":
        query_pids = query_pids[:LARGE_QUERIES]
    centres = F.normalize(torch.randn(size.identities, IDENTITY_DIM) @ torch.randn(IDENTITY_DIM, DIM))
    sides = []
    for pids in (query_pids, gallery_pids):
        vectors = torch.randn(len(pids), DIM)
        F.normalize(vectors, dim=1, out=vectors)
        if trained:
            vectors = F.normalize((1 - IDENTITY) * vectors + IDENTITY * centres[pids])
        sides.append(vectors)
    return sides[0], sides[1], query_pids, gallery_pids


def product(query: Tensor, gallery: Tensor, *_: Tensor) -> float:
    """The matrix product alone, in the chunks of the streamed ranking; no ranking is faster."""
    return max(float(scores[0, 0]) for scores in similarity_chunks(query, gallery))


def full_argsort(query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
    """Metrics by matrices of all queries and gallery items, in the steps of anosorae/IRRA@cfc2378:utils/metrics.py."""
    order = torch.argsort(query @ gallery.T, dim=1, descending=True)
    relevant = gallery_pids[order].eq(query_pids[:, None])
    del order
    number, found = relevant.sum(1), relevant.cumsum(1)
    first = [relevant[:, :k].any(1).double() for k in (1, 5, 10)]
    last = torch.stack([row.nonzero()[-1, 0] for row in relevant]) + 1
    precision = torch.stack([found[:, place] / (place + 1.0) for place in range(found.shape[1])], 1) * relevant
    values = [*first, precision.sum(1) / number, number / last]
    return {name: 100 * float(value.mean()) for name, value in zip(METRICS, values, strict=True)}


WAYS: dict[str, Callable[..., object]] = {
    "product": product,
    "streamed": streamed_metrics,
    "full argsort": full_argsort,
}


def peak(way: str, name: str, trained: bool) -> tuple[float, float, Any]:
    """Seconds, peak MB besides the embeddings, and result of a way; to be called in a fresh process."""
    data = split(name, trained)
    return measured(lambda: WAYS[way](*data))


def compare(name: str, trained: bool, rounds: int, plain: bool) -> None:
    """Print a table of the ways on one size; the full argsort runs once, because it takes long on ICFG-PEDES."""
    data = split(name, trained)
    query, gallery, query_pids, gallery_pids = data
    ways = {way: functools.partial(WAYS[way], *data) for way in ("product", "streamed")}
    timed = interleaved(ways, rounds)
    matches = torch.bincount(gallery_pids)[query_pids]
    values = streamed_metrics(*data)
    print(
        f"\n{name}: {len(query)} x {len(gallery)}, {'trained' if trained else 'random'} embeddings, "
        f"{matches.double().mean():.1f} relevant items (at most {matches.max()}), "
        f"R1 {values['R1']:.1f}, mAP {values['mAP']:.1f}, mINP {values['mINP']:.1f}; {rounds} rounds\n\n"
        "| way | seconds, median | range | x product | peak MB |\n|---|---:|---:|---:|---:|"
    )
    for way in ways:
        _, memory, _ = in_fresh_process(peak, way, name, trained)
        print(f"| {way} | {timed.cells(way)} | {timed.ratio(way, 'product'):.2f} | {memory:.0f} |")
    if plain:
        seconds, memory, again = in_fresh_process(peak, "full argsort", name, trained)
        ratio = seconds / statistics.median(timed.seconds["product"])
        print(f"| full argsort, once | {seconds:.3f} | | {ratio:.1f} | {memory:.0f} |")
        assert all(abs(again[metric] - value) < 1e-3 for metric, value in values.items())
    print(f"\n{timed.note}")


def large() -> None:
    """Print time and memory of the large gallery, once, and the product of a tenth of its queries."""
    seconds, memory, _ = in_fresh_process(peak, "streamed", "large", False)
    query, gallery, *_ = split("large", False)
    start = time.perf_counter()
    product(query[: len(query) // 10], gallery)
    floor = 10 * (time.perf_counter() - start)
    held = gallery.nbytes / 2**20
    print(
        f"\nlarge: {len(query)} x {len(gallery)}, random embeddings, once: {seconds:.0f} s, {seconds / floor:.2f} x "
        f"the product ({floor:.0f} s, of a tenth of the queries); {memory:.0f} MB besides {held:.0f} MB of embeddings"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="icfg", help="size of the test split (default: icfg)")
    parser.add_argument("--rounds", type=positive, default=5, help="default: 5")
    parser.add_argument("--plain", action="store_true", help="a full argsort as well; 14 GB at the size of icfg")
    with exit_on_user_error():
        args = parser.parse_args()
        print(f"{describe_device(default_device())}, torch {torch.__version__}")
        if args.size == "large":
            large()
        else:
            for trained in (True, False):
                compare(args.size, trained, args.rounds, args.plain and trained)
