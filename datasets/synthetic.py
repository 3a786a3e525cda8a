"""Renders pedestrians and writes captions for them, in the layout of CUHK-PEDES: a data set that needs no download."""

import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from datasets.captions import Caption, describe
from datasets.pedestrian import draw
from datasets.people import Identity, Rng, View, random_identity, random_view

FOLDER = "SyntheticPEDES"
T = TypeVar("T")
S = TypeVar("S")
Row = dict[str, Any]


@dataclass(frozen=True)
class Shot:
    """One image of an identity: how it is seen, and what is said about it."""

    view: View
    captions: list[Caption]


def plan_identity(seed: int, pid: int, images: int, captions: int) -> tuple[Identity, list[Shot], Rng]:
    """All that is decided before anything is drawn, and the generator to draw with.

    Captions come before pixels so that their text depends on the seed and on `random()` alone.
    """
    rng = np.random.default_rng([seed, pid])
    who, shots = random_identity(rng), []
    for _ in range(images):
        view = random_view(rng)
        shots.append(Shot(view, [describe(who, view, rng) for _ in range(captions)]))
    return who, shots, rng


def render_identity(job: tuple[int, str], *, folder: Path, seed: int, images: int, captions: int) -> list[Row]:
    """Draws the images of one identity, given as (pid, split), into `folder`/imgs; returns their annotations."""
    pid, split = job
    who, shots, rng = plan_identity(seed, pid, images, captions)
    rows = []
    for number, shot in enumerate(shots):
        name = f"{split}/{pid:04d}_{number}.jpg"
        draw(who, shot.view, rng).save(folder / "imgs" / name, quality=90, subsampling=0)
        rows.append({"id": pid, "file_path": name, "captions": [c.text for c in shot.captions], "split": split})
    return rows


def render_dataset(
    root: Path, *, seed: int = 0, train_ids: int = 800, val_ids: int = 100, test_ids: int = 150,
    images_per_id: int = 4, captions_per_image: int = 2, workers: int | None = None,
) -> Path:  # fmt: skip
    """Renders the data set under `root`, or finds it there; either way returns its folder.

    The result depends on the seed and the counts, not on the number of `workers` (None: one per usable core; 0 or 1:
    this process). It appears under its name only when complete.

    Raises:
        ValueError: a count is below 1, or `seed` or `workers` below 0.
        OSError: `root` cannot be written.
    """
    folder = Path(root) / FOLDER
    counts = {"train_ids": train_ids, "val_ids": val_ids, "test_ids": test_ids}
    per_id = {"images_per_id": images_per_id, "captions_per_image": captions_per_image}
    for name, value in (counts | per_id | {"seed": seed, "workers": workers or 0}).items():
        least = 0 if name in ("seed", "workers") else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{FOLDER}.{socket.gethostname()}.{os.getpid()}.tmp")
    _remove_dead_drafts(folder.parent)
    try:
        splits = [name.removesuffix("_ids") for name, count in counts.items() for _ in range(count)]
        render = partial(render_identity, folder=draft, seed=seed, images=images_per_id, captions=captions_per_image)
        _write(draft, render, splits, workers)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write(draft: Path, render: Callable[[tuple[int, str]], list[Row]], splits: list[str], workers: int | None) -> None:
    """Fills `draft` with the images, the annotations and the tokenizer learnt from the training captions."""
    from datasets.tokenizers import train_tokenizer  # here, so that the drawing processes do not load its libraries

    for split in dict.fromkeys(splits):
        (draft / "imgs" / split).mkdir(parents=True)
    rows: list[Row] = []
    with tqdm(total=len(splits), desc="rendering", unit="person", disable=None) as bar:
        for of_identity in _mapped(render, list(enumerate(splits, start=1)), workers):
            rows += of_identity
            bar.update()
    (draft / "reid_raw.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    captions = [caption for row in rows if row["split"] == "train" for caption in row["captions"]]
    train_tokenizer(captions, draft / "tokenizer")


def _mapped(function: Callable[[T], S], items: list[T], workers: int | None) -> Iterator[S]:
    """`map` in order, over `workers` processes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(usable, 8) if workers is None else workers
    if count <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: the caller may hold threads of torch, whose locks a fork would copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent) as pool:
        yield from pool.map(function, items, chunksize=4)


def _end_with_parent() -> None:
    """Lets a worker end when its parent is killed; it would wait for work for ever."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _publish(draft: Path, folder: Path) -> None:
    """Gives the finished draft its name, unless another process was faster."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _remove_dead_drafts(root: Path) -> None:
    """Deletes what killed renderings left."""
    for draft in root.glob(f".{FOLDER}.*.tmp"):
        if _is_dead(draft):
            shutil.rmtree(draft, ignore_errors=True)


def _is_dead(draft: Path) -> bool:
    """Whether nobody works on this draft: its process on this host has ended, or another host's is idle for an hour."""
    host, _, pid = draft.name.removeprefix(f".{FOLDER}.").removesuffix(".tmp").rpartition(".")
    try:
        if host != socket.gethostname() or not pid.isdigit():
            return time.time() - max(path.stat().st_mtime for path in (draft, *draft.glob("imgs/*"))) > 3600
        if int(pid) != os.getpid():
            os.kill(int(pid), 0)  # signal 0 only asks whether the process exists
            return False
    except ProcessLookupError:
        return True
    except (FileNotFoundError, PermissionError):  # finished since it was listed; another user's process
        return False
    return True
