"""Annotation files -> Records: one small adapter per data set; relabelling, pairs and checks are shared by all."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from datasets.synthetic.render import render_dataset
from utils.errors import DataError
from utils.registry import Registry

SPLITS = ("train", "val", "test")
GET_IT = "get the data set from its authors and put it there"


@dataclass(frozen=True)
class Record:
    """One annotated image: its path, the person on it, its running number in its split, and its captions."""

    image_path: str
    pid: int
    image_id: int
    captions: tuple[str, ...]
    split: str
    attributes: tuple[Mapping[str, str], ...] = ()  # named phrases of each caption, where the file has them


@dataclass(frozen=True)
class Annotations:
    """The records of a data set by split, its folder, and how many identities of train were made its val split."""

    folder: Path
    train: list[Record]
    val: list[Record]
    test: list[Record]
    carved_ids: int = 0

    @property
    def train_labels(self) -> dict[int, int]:
        """Training pid -> label 0..C-1, in ascending order of the pids."""
        return {pid: label for label, pid in enumerate(sorted({record.pid for record in self.train}))}

    def split(self, name: str) -> list[Record]:
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def table(self) -> str:
        """Identities, images and captions of each split, as the field's logs print them."""
        rows = [f"{'subset':<8} {'ids':>8} {'images':>8} {'captions':>8}"]
        rows += [f"{name:<8} {' '.join(f'{count:>8}' for count in count_split(self.split(name)))}" for name in SPLITS]
        return "\n".join(rows)

    def notes(self) -> list[str]:
        """What the reader of a log should know about these splits and labels."""
        notes = []
        if self.carved_ids:
            notes.append(
                f"the data set has no val split: {self.carved_ids} identities of train are val (data.val_ids); "
                "eval.select_on=test trains on all of them, as the papers do"
            )
        pids = list(self.train_labels)
        if pids != list(range(len(pids))):
            unused = pids[-1] - pids[0] + 1 - len(pids)
            notes.append(
                f"training identities {pids[0]}..{pids[-1]} are relabelled 0..{len(pids) - 1} in ascending order"
                + (f" ({unused} numbers in between are nobody's)" if unused else "")
            )
        return notes


class Source(NamedTuple):
    """A data set on disk: its folder (images lie in imgs/), its annotation file, and what that holds, unchecked."""

    folder: Path
    file: Path
    rows: list[Any]


Adapter = Callable[[Path], Source]
ADAPTERS: Registry[Adapter] = Registry("data set")


def load_annotations(dataset: str, root: str | Path, *, val_ids: int = 0) -> Annotations:
    """Read and check the annotations of `dataset` under the data root.

    Args:
        val_ids: where the data set has no val split, make one of this many identities of train.

    Raises:
        ConfigError: no adapter has this name.
        DataError: a file or folder is missing, or an annotation lacks what training and evaluation need.
    """
    source = ADAPTERS.get(dataset, "data.dataset")(Path(root))
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for number in range(len(source.rows)):
        _add(splits, read_record(source, number))
    for name in ("train", "test"):
        if not splits[name]:
            raise DataError(f"{source.file}: the annotations have no {name} images")
    annotations = Annotations(source.folder, splits["train"], splits["val"], splits["test"])
    return carve_val(annotations, val_ids) if val_ids and not annotations.val else annotations


def _add(splits: dict[str, list[Record]], record: Record) -> None:
    """Number a record in its split. With attributes, there is a row for each caption: rows of an image are joined."""
    records = splits[record.split]
    last = records[-1] if records and record.attributes else None
    if last is None or not last.attributes or (last.image_path, last.pid) != (record.image_path, record.pid):
        records.append(replace(record, image_id=len(records)))
    else:
        captions, attributes = last.captions + record.captions, last.attributes + record.attributes
        records[-1] = replace(last, captions=captions, attributes=attributes)


def carve_val(annotations: Annotations, num_ids: int) -> Annotations:
    """Move `num_ids` identities from train to val: always the same ones, whatever the seed and the library versions.

    Raises:
        DataError: there are not that many to spare.
    """
    pids = sorted(annotations.train_labels, key=lambda pid: hashlib.sha256(str(pid).encode()).digest())
    if num_ids >= len(pids):
        raise DataError(
            f"{annotations.folder}: has no val split, and {num_ids} of {len(pids)} training identities are too many "
            "to make one; lower data.val_ids, or eval.select_on=test"
        )
    held_out = set(pids[:num_ids])
    train = [record for record in annotations.train if record.pid not in held_out]
    val = [replace(record, split="val") for record in annotations.train if record.pid in held_out]
    train, val = ([replace(record, image_id=n) for n, record in enumerate(part)] for part in (train, val))
    return replace(annotations, train=train, val=val, carved_ids=num_ids)


def count_split(records: Iterable[Record]) -> tuple[int, int, int]:
    """Identities, images and captions."""
    records = list(records)
    return len({record.pid for record in records}), len(records), sum(len(record.captions) for record in records)


@ADAPTERS.register("cuhk_pedes")
def cuhk_pedes(root: Path) -> Source:
    """CUHK-PEDES (Li et al., CVPR 2017), or IVT's edition of it, with one annotation per caption and attributes."""
    return _read_json(root / "CUHK-PEDES", ["reid_raw.json", "cuhk_pedes_att.json"], get_it=GET_IT)


@ADAPTERS.register("icfg_pedes")
def icfg_pedes(root: Path) -> Source:
    """ICFG-PEDES (Ding et al., arXiv 2107.12666): no val split; its file has one name in the data set, one in IRRA."""
    return _read_json(root / "ICFG-PEDES", ["ICFG-PEDES.json", "ICFG_PEDES.json"], get_it=GET_IT)


@ADAPTERS.register("rstpreid")
def rstpreid(root: Path) -> Source:
    """RSTPReid (Zhu et al., ACM MM 2021); calls `img_path` what the others call `file_path`."""
    return _read_json(root / "RSTPReid", ["data_captions.json"], get_it=GET_IT)


@ADAPTERS.register("synthetic")
def synthetic(root: Path) -> Source:
    """Rendered pedestrians in the layout of CUHK-PEDES, drawn on first use (datasets/synthetic/render.py)."""
    try:
        folder = render_dataset(root)
    except OSError as error:
        raise DataError(f"{root}: the pedestrians cannot be rendered there ({error}); change data.root") from None
    return _read_json(folder, ["reid_raw.json"], get_it=f"delete {folder} to have it rendered anew")


def _read_json(folder: Path, names: list[str], get_it: str) -> Source:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data set folder; {get_it}, or change data.root")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{folder / ' or '.join(names)}: no such annotation file; {get_it}, or change data.root")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of annotations, is a {type(rows).__name__}")
    return Source(folder, path, rows)


def read_record(source: Source, number: int) -> Record:
    """One annotation as a Record with image_id 0.

    Raises:
        DataError: a field is missing or of the wrong type, or the image lies outside the data set.
    """
    row, where = source.rows[number], f"{source.file}: annotation {number}"
    if not isinstance(row, dict):
        raise DataError(
            f"{where} must be a mapping with split, id, file_path and captions, not of type {type(row).__name__}"
        )
    path_field = "img_path" if "img_path" in row else "file_path"
    missing = [name for name in ("split", "id", path_field, "captions") if name not in row]
    if missing:
        hint = " (this looks like the split-less caption_all.json; use reid_raw.json)" if "split" in missing else ""
        raise DataError(f"{where} has no {', '.join(missing)}{hint}")
    split, pid, name, captions = row["split"], row["id"], row[path_field], row["captions"]
    attributes = row.get("att")
    if isinstance(captions, str) and attributes is not None:
        captions = [captions]  # IVT's edition has a row for each caption
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: {path_field} must be the path of an image below imgs/, is {name!r}")
    where += f" ({name})"
    if not isinstance(split, str):
        raise DataError(f"{where}: split must be train, val or test, is {split!r}")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid.bit_length() > 63:
        raise DataError(f"{where}: id must be a whole number of 64 bits, is {pid!r}")
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{where}: captions must be a list of one or more texts")
    if attributes is not None and not (
        isinstance(attributes, dict) and all(isinstance(text, str) for pair in attributes.items() for text in pair)
    ):
        raise DataError(f"{where}: att must be a mapping of names to phrases")
    windows = PureWindowsPath(name)  # understands both kinds of separators
    if windows.anchor or ".." in windows.parts:
        raise DataError(f"{where}: {path_field} points outside the data set")
    split = split if split in ("train", "test") else "val"
    phrases = () if attributes is None else (attributes,) * len(captions)
    return Record(str(source.folder / "imgs" / name), pid, 0, tuple(captions), split, phrases)
