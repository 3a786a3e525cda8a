"""Time of a training epoch of the data loader, without and with its cache, beside IRRA's own loader; CPU."""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import irra_loader
from benchmarks.common.rounds import interleaved
from configs.arguments import positive
from configs.schema import DataConfig
from datasets.annotations import Record
from datasets.collate import Collate
from datasets.image_cache import cached_images
from datasets.pairs import TrainPairs
from datasets.text.merges import installed_merges
from datasets.text.tokenizers import build_tokenizer
from datasets.transforms import build_transform
from datasets.workers import data_loader
from utils.batch import to_device
from utils.errors import ConfigError
from utils.exit import exit_on_user_error
from utils.paths import expand

FIELDS = ("index", "images", "caption_ids", "pids", "image_ids", "mlm_ids", "mlm_labels", "mlm_positions")
CAPTION = "the man is wearing a dark blue jacket over a white shirt, black trousers and brown shoes with a red bag"


def records_in(folder: Path, number: int) -> list[Record]:
    """Draw JPEG files of CUHK-PEDES's sizes, with a caption of 21 words each."""
    rng = np.random.default_rng(0)
    records = []
    for place in range(number):
        width = int(rng.integers(60, 180))
        height = int(width * rng.uniform(2.2, 3.0))
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height))) + rng.normal(0, 6, (height, width, 3))
        path = folder / f"{place}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        caption = " ".join(rng.permutation(CAPTION.split()))
        records.append(Record(str(path), place, place, (caption,), "train"))
    return records


def epoch_of_ours(
    records: list[Record], config: DataConfig, merges: Path, workers: int, *, normalise: bool = True
) -> Callable[[], None]:
    """An epoch of IRRA's batches: as the model sees them, or as they go to a GPU, which normalises them."""
    cache = cached_images(config, records, train=True)
    labels = {record.pid: record.pid for record in records}
    tokenizer = build_tokenizer(str(merges), config.text_length)
    pairs = TrainPairs(records, labels, build_transform(config, train=True), tokenizer, FIELDS, 1, config, cache)
    assert len(pairs.caption_ids) == len(records)
    options = {"batch_size": 64, "shuffle": True, "collate_fn": Collate(FIELDS)}
    loader = data_loader(pairs, workers=workers, timeout=60, **options)

    def epoch() -> None:
        for batch in loader:
            if normalise:
                to_device(batch, torch.device("cpu"))

    return epoch


def epoch_of_irra(
    checkout: Path, folder: Path, records: list[Record], merges: Path, workers: int
) -> Callable[[], None]:
    """An epoch of IRRA's loader in a process of its own."""
    pairs = folder / "pairs.json"
    rows = [(record.pid, record.image_id, record.image_path, record.captions[0]) for record in records]
    pairs.write_text(json.dumps(rows))
    command = [sys.executable, irra_loader.__file__, checkout, pairs, merges, str(workers)]
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    ask, answer = process.stdin, process.stdout

    def epoch() -> None:
        print("epoch", file=ask, flush=True)
        if not answer.readline():
            raise ConfigError(f"--authors: must be a checkout of anosorae/IRRA, got {checkout}")

    return epoch


def compare(folder: Path, number: int, workers: int, rounds: int, authors: Path | None) -> None:
    """Print a table for a number of workers."""
    merges = installed_merges()
    if merges is None:
        raise ConfigError("data.tokenizer: needs CLIP's merges, got none; pip install open_clip_torch")
    records = records_in(folder, number)
    plain = DataConfig(image_aug=["flip", "pad_crop", "erase"], workers=workers, cache="off")
    cached = dataclasses.replace(plain, cache="on", cache_dir=str(folder / "cache"))
    start = time.perf_counter()
    cached_images(cached, records, train=True)
    building = time.perf_counter() - start
    ways = {
        "decoded in every epoch": epoch_of_ours(records, plain, merges, workers),
        "cached": epoch_of_ours(records, cached, merges, workers),
        "cached, to be normalised by a GPU": epoch_of_ours(records, cached, merges, workers, normalise=False),
    }
    if authors is not None:
        ways = {"IRRA's": epoch_of_irra(authors, folder, records, merges, workers)} | ways
    timed = interleaved(ways, rounds)
    first = next(iter(ways))
    print(
        f"\n{number} items, {workers} workers, {rounds} rounds; the cache took {building:.2f} s\n\n"
        f"| loader | seconds, median | range | x {first} |\n|---|---:|---:|---:|"
    )
    for way in ways:
        print(f"| {way} | {timed.cells(way)} | {timed.ratio(way, first):.2f} |")
    print(f"\n{timed.note}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=positive, default=1024, help="default: 1024")
    parser.add_argument("--rounds", type=positive, default=7, help="default: 7")
    parser.add_argument("--authors", type=expand, help="a checkout of anosorae/IRRA, to compare with")
    with exit_on_user_error(), tempfile.TemporaryDirectory() as place:
        args = parser.parse_args()
        for number_of_workers in (0, 2):
            compare(Path(place), args.items, number_of_workers, args.rounds, args.authors)
