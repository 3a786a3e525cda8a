"""Annotation files -> Records: one small adapter per data set; relabelling, pairs and checks are shared by all."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.synthetic import render_dataset
from utils.errors import DataError
from utils.registry import Registry

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One annotated image: its path, the person on it, its running number in its split, and its captions."""

    image_path: str
    pid: int
    image_id: int
    captions: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Annotations:
    """The records of a data set by split, its folder, and its training identities in the order of their labels."""

    folder: Path
    train: list[Record]
    val: list[Record]
    test: list[Record]

    @property
    def train_labels(self) -> dict[int, int]:
        """Training pid -> label 0..C-1, in ascending order of the pids."""
        return {pid: label for label, pid in enumerate(sorted({record.pid for record in self.train}))}

    def split(self, name: str) -> list[Record]:
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def table(self) -> str:
        """Identities, images and captions of each split, as the field's logs print them."""
        rows = [f"{'subset':<8} {'ids':>8} {'images':>8} {'captions':>8}"]
        for name in SPLITS:
            records = self.split(name)
            captions = sum(len(record.captions) for record in records)
            rows.append(f"{name:<8} {len({r.pid for r in records}):>8} {len(records):>8} {captions:>8}")
        return "\n".join(rows)


Adapter = Callable[[Path], tuple[Path, Iterable[dict[str, Any]]]]
ADAPTERS: Registry[Adapter] = Registry("data set")


def load_annotations(dataset: str, root: str | Path) -> Annotations:
    """Read and check the annotations of `dataset` under the data root.

    Raises:
        ConfigError: no adapter has this name.
        DataError: a file or folder is missing, or an annotation lacks what training and evaluation need.
    """
    folder, rows = ADAPTERS.get(dataset, "data.dataset")(Path(root))
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for number, row in enumerate(rows):
        split = row["split"] if row["split"] in ("train", "test") else "val"
        splits[split].append(_record(row, folder, number, image_id=len(splits[split]), split=split))
    for name in ("train", "test"):
        if not splits[name]:
            raise DataError(f"{folder}: the annotations have no {name} images")
    return Annotations(folder, **splits)


@ADAPTERS.register("cuhk_pedes")
def cuhk_pedes(root: Path) -> tuple[Path, Iterable[dict[str, Any]]]:
    """CUHK-PEDES (Li et al., CVPR 2017): imgs/ and reid_raw.json with `split`, `id`, `file_path`, `captions`."""
    folder = root / "CUHK-PEDES"
    return folder, _read_json(folder, "reid_raw.json", get_it="get CUHK-PEDES from its authors and put it there")


@ADAPTERS.register("synthetic")
def synthetic(root: Path) -> tuple[Path, Iterable[dict[str, Any]]]:
    """Rendered pedestrians in the layout of CUHK-PEDES, drawn on first use (datasets/synthetic.py)."""
    try:
        folder = render_dataset(root)
    except OSError as error:
        raise DataError(f"{root}: the pedestrians cannot be rendered there ({error}); change data.root") from None
    return folder, _read_json(folder, "reid_raw.json", get_it=f"delete {folder} to have it rendered anew")


def _read_json(folder: Path, name: str, get_it: str) -> Iterator[dict[str, Any]]:
    path = folder / name
    if not path.is_file():
        what = "annotation file" if folder.is_dir() else "data set folder"
        raise DataError(f"{path if folder.is_dir() else folder}: no such {what}; {get_it}, or change data.root")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of annotations")
    for number, row in enumerate(rows):
        missing = {"split", "id", "file_path", "captions"} - row.keys()
        if missing:
            hint = " (this is the split-less caption_all.json; use reid_raw.json)" if "split" in missing else ""
            raise DataError(f"{path}: annotation {number} has no {', '.join(sorted(missing))}{hint}")
        yield row


def _record(row: dict[str, Any], folder: Path, number: int, *, image_id: int, split: str) -> Record:
    captions, name = row["captions"], Path(str(row["file_path"]))
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{folder}: annotation {number} ({name}) must have a list of captions")
    if not isinstance(row["id"], int):
        raise DataError(f"{folder}: annotation {number} ({name}) has an id that is no whole number: {row['id']!r}")
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{folder}: annotation {number} points outside the data set: {name}")
    return Record(str(folder / "imgs" / name), row["id"], image_id, tuple(captions), split)
