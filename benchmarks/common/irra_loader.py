"""Epochs of IRRA's own training loader, in a process of its own: its packages have the names of ours.

Started by `benchmarks.loader` as a script, in a checkout of anosorae/IRRA. It prints the seconds of an epoch for each
line of standard input. Modules that a loader does not need are empty.
"""

import json
import sys
import time
from typing import Any
from unittest import mock

UNUSED = (
    *("datasets.sampler", "datasets.sampler_ddp", "datasets.cuhkpedes", "datasets.icfgpedes", "datasets.rstpreid"),
    *("utils.comm", "utils.iotools", "prettytable"),
)


def read_image(path: str) -> Any:
    """The image as IRRA reads it."""
    from PIL import Image

    return Image.open(path).convert("RGB")


def main(checkout: str, pairs: str, merges: str, workers: str) -> None:
    import torch

    sys.path[:] = [checkout, *(path for path in sys.path if "benchmarks" not in path)]
    for name in UNUSED:
        sys.modules[name] = mock.MagicMock(read_image=read_image, __name__=name)
    from datasets import bases, build  # type: ignore[attr-defined]

    bases.SimpleTokenizer.__init__.__defaults__ = (merges,)
    with open(pairs, encoding="utf-8") as file:
        data = bases.ImageTextMLMDataset(json.load(file), build.build_transforms(aug=True))
    loader = torch.utils.data.DataLoader(data, 64, True, num_workers=int(workers), collate_fn=build.collate)
    for _ in sys.stdin:
        start = time.perf_counter()
        for batch in loader:
            batch["images"].sum  # noqa: B018
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
