"""Synthetic data set: rendered pedestrians with captions, in the layout of CUHK-PEDES."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets.synthetic.captions import Caption, describe
from datasets.synthetic.pedestrian import draw
from datasets.synthetic.people import Identity, Rng, View, random_identity, random_view
from datasets.text.learning import train_tokenizer
from utils.paths import naming

FOLDER = "SyntheticPEDES"
Row = dict[str, Any]


@dataclass(frozen=True)
class Shot:
    """View and captions of one image of an identity."""

    view: View
    captions: list[Caption]


def plan_identity(seed: int, pid: int, images: int, captions: int) -> tuple[Identity, list[Shot], Rng]:
    """Draw an identity with its views and captions; returns them and the generator to render with.

    Captions are drawn before pixels, so that they depend on the seed and on `random()` alone.
    """
    rng = np.random.default_rng([seed, pid])
    who, shots = random_identity(rng), []
    for _ in range(images):
        view = random_view(rng)
        shots.append(Shot(view, [describe(who, view, rng) for _ in range(captions)]))
    return who, shots, rng


def render_identity(pid: int, split: str, *, folder: Path, seed: int, images: int, captions: int) -> list[Row]:
    """Render the images of one identity into `folder`/imgs; returns their annotations."""
    who, shots, rng = plan_identity(seed, pid, images, captions)
    rows = []
    for number, shot in enumerate(shots):
        name = f"{split}/{pid:04d}_{number}.jpg"
        draw(who, shot.view, rng).save(folder / "imgs" / name, quality=90, subsampling=0)
        rows.append({"id": pid, "file_path": name, "captions": [c.text for c in shot.captions], "split": split})
    return rows


def render_dataset(
    root: Path, *, seed: int = 0, train_ids: int = 800, val_ids: int = 100, test_ids: int = 150,
    images_per_id: int = 4, captions_per_image: int = 2,
) -> Path:  # fmt: skip
    """Render the data set under `root` unless it exists; returns its folder.

    The result depends on the seed and the counts alone. The folder appears under its name only when complete. A single
    process renders 4,200 images in about ten seconds, which workers would need to start.

    Args:
        root: data root.
        seed: random seed.
        train_ids: training identities.
        val_ids: validation identities.
        test_ids: test identities.
        images_per_id: images of each identity.
        captions_per_image: captions of each image.

    Raises:
        ValueError: a count is below 1, or `seed` below 0.
        OSError: `root` cannot be written.
    """
    folder = Path(root) / FOLDER
    counts = {"train_ids": train_ids, "val_ids": val_ids, "test_ids": test_ids}
    per_id = {"images_per_id": images_per_id, "captions_per_image": captions_per_image}
    for name, value in (counts | per_id | {"seed": seed}).items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{FOLDER}.{socket.gethostname()}.{os.getpid()}.tmp")
    _remove_dead_drafts(folder.parent)
    try:
        splits = [name.removesuffix("_ids") for name, count in counts.items() for _ in range(count)]
        render = partial(render_identity, folder=draft, seed=seed, images=images_per_id, captions=captions_per_image)
        with naming(folder):
            _write(draft, render, splits)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write(draft: Path, render: Callable[[int, str], list[Row]], splits: list[str]) -> None:
    """Write images, annotations, and a tokenizer learnt from the training captions."""
    for split in dict.fromkeys(splits):
        (draft / "imgs" / split).mkdir(parents=True)
    rows: list[Row] = []
    for pid, split in enumerate(tqdm(splits, desc="rendering", unit="person", disable=None), start=1):
        rows += render(pid, split)
    (draft / "reid_raw.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    captions = [caption for row in rows if row["split"] == "train" for caption in row["captions"]]
    train_tokenizer(captions, draft / "tokenizer")


def _publish(draft: Path, folder: Path) -> None:
    """Rename the finished draft, unless another process was faster."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _remove_dead_drafts(root: Path) -> None:
    """Delete the drafts of killed processes."""
    for draft in root.glob(f".{FOLDER}.*.tmp"):
        if _is_dead(draft):
            shutil.rmtree(draft, ignore_errors=True)


def _is_dead(draft: Path) -> bool:
    """True if the draft's process on this host has ended, or if that of another host has been idle for an hour."""
    host, _, pid = draft.name.removeprefix(f".{FOLDER}.").removesuffix(".tmp").rpartition(".")
    try:
        if host != socket.gethostname() or not pid.isdigit():
            return time.time() - max(path.stat().st_mtime for path in (draft, *draft.glob("imgs/*"))) > 3600
        if int(pid) != os.getpid():
            os.kill(int(pid), 0)  # signal 0 tests whether the process exists
            return False
    except ProcessLookupError:
        return True
    except (FileNotFoundError, PermissionError):  # finished in the meantime, or another user's process
        return False
    return True
