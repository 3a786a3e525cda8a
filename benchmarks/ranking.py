"""Time and peak memory of the streamed ranking and of a full argsort; Linux, CPU."""

import argparse
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.profiling import in_fresh_process, measured
from configs.arguments import positive
from utils.exit import exit_on_user_error
from utils.metrics import streamed_metrics


def plain_metrics(query: Tensor, gallery: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
    """Textbook metrics from a full argsort of the similarities."""
    order = (query @ gallery.T).argsort(dim=1, descending=True, stable=True)
    relevant = gallery_pids[order] == query_pids[:, None]
    places = torch.arange(1, len(gallery) + 1)
    hits, total = relevant.cumsum(1), relevant.sum(1)
    average = (hits / places * relevant).sum(1) / total
    penalty = total / (relevant * places).amax(1)
    values = {f"R{k}": relevant[:, :k].any(1).double() for k in (1, 5, 10)} | {"mAP": average, "mINP": penalty}
    return {name: 100.0 * float(value.mean()) for name, value in values.items()}


def measure(metrics: Callable[..., dict[str, float]], size: int, dim: int) -> tuple[float, float, dict[str, float]]:
    """Seconds, peak MB besides the embeddings, and metrics of random pairs with 20 items per pid."""
    torch.manual_seed(0)
    embeddings = torch.randn(2, size, dim)
    embeddings /= embeddings.norm(dim=2, keepdim=True)
    pids = torch.arange(size) // 20
    gallery_pids = pids[torch.randperm(size)]
    return measured(lambda: metrics(*embeddings, pids, gallery_pids))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=positive, default=19848, help="queries, and gallery items (default: ICFG-PEDES)")
    parser.add_argument("--dim", type=positive, default=512)
    with exit_on_user_error():
        args = parser.parse_args()
        half_free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        both = min(args.size, math.isqrt(half_free // 32))  # size at which the argsort fits, with 32 bytes per pair
        taken = {}
        for metrics, size in [(streamed_metrics, args.size), (streamed_metrics, both), (plain_metrics, both)]:
            seconds, peak, values = in_fresh_process(measure, metrics, size, args.dim)
            taken[metrics] = seconds, peak
            print(f"{metrics.__name__:17} {size} x {size}  {seconds:.2f} s  {peak:.0f} MB  mAP {values['mAP']:.3f}")
        (fast, small), (slow, large) = taken.values()
        print(f"streamed / plain at {both}: time 1/{slow / fast:.1f}, memory 1/{large / small:.1f}")
