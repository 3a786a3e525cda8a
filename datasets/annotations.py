"""Annotation files -> records. Each data set has a small adapter; relabelling, pairs and checks are shared."""

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from configs.schema import Config, DataConfig
from datasets.annotation_files import Source as Source
from datasets.annotation_files import missing_fields, read_annotations
from datasets.forms import advice, description
from datasets.synthetic.render import render_dataset
from utils.errors import DataError
from utils.paths import below, in_full
from utils.registry import Registry

SPLITS = ("train", "val", "test")
MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Record:
    """One annotated image with its captions."""

    image_path: str
    pid: int  # raw, as in the annotation file
    image_id: int  # number of the image in its split
    captions: tuple[str, ...]
    split: str
    attributes: tuple[Mapping[str, str], ...] = ()  # name -> phrase, for each caption, if the file has them


@dataclass(frozen=True)
class Annotations:
    """Records of a data set by split."""

    folder: Path
    train: list[Record]
    val: list[Record]
    test: list[Record]
    file: Path | None = None  # annotation file
    carved_ids: int = 0  # training identities held out as val
    other_splits: Sequence[str] = ()  # unknown split names that count as val, with their numbers of annotations

    @property
    def train_labels(self) -> dict[int, int]:
        """Raw pid -> label 0..C-1, in ascending order of the training pids."""
        return {pid: label for label, pid in enumerate(sorted({record.pid for record in self.train}))}

    def training_captions(self) -> list[str]:
        """Captions of the training split in alphabetical order, those of held out identities included."""
        records = [*self.train, *(self.val if self.carved_ids else ())]
        return sorted(caption for record in records for caption in record.captions)

    def split(self, name: str) -> list[Record]:
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def table(self) -> str:
        """Number of identities, images and captions of each split, as the field's logs print them."""
        rows = [("subset", "ids", "images", "captions"), *((name, *count_split(self.split(name))) for name in SPLITS)]
        return "\n".join(f"{name:<8} {' '.join(f'{count:>8}' for count in counts)}" for name, *counts in rows)

    def notes(self) -> list[str]:
        """Remarks about splits and labels, for the log."""
        notes = []
        if self.other_splits:
            notes.append(f"annotations of these splits count as val: {examples(self.other_splits)}")
        if self.carved_ids:
            notes.append(
                f"no val split: held out {self.carved_ids} training identities (data.val_ids); with "
                "eval.select_on=test all are trained on, as in the papers"
            )
        pids = list(self.train_labels)
        if pids != list(range(len(pids))):
            unused = pids[-1] - pids[0] + 1 - len(pids)
            notes.append(
                f"training identities {pids[0]}..{pids[-1]} are relabelled 0..{len(pids) - 1} in ascending order"
                + (f" ({unused} numbers in between are unused)" if unused else "")
            )
        return notes


Adapter = Callable[[Path], Source]
ADAPTERS: Registry[Adapter] = Registry("data set", "datasets")


def load_annotations(dataset: str, root: str | Path, *, val_ids: int = 0) -> Annotations:
    """Read and check the annotations of a data set.

    Args:
        dataset: name of its adapter.
        root: data root.
        val_ids: number of training identities to hold out, if there is no val split.

    Raises:
        ConfigError: no adapter has this name.
        DataError: a file or folder is missing, or an annotation is malformed.
    """
    source = ADAPTERS.get(dataset, "data.dataset")(Path(root))
    misspelt, others = odd_splits(source.rows)
    if misspelt:
        raise DataError(f"{source.file}: split must be train, val or test, got {examples(misspelt)}; correct the file")
    records = join_rows(read_record(source, number) for number in range(len(source.rows)))
    if torn := torn_images(records):
        raise DataError(
            f"{source.file}: all annotations of an image must have the same id and split, got several for {len(torn)} "
            f"of {len({record.image_path for record in records})} images: {examples(torn)}; correct the file"
        )
    splits = {name: _numbered(record for record in records if record.split == name) for name in SPLITS}
    for name in ("train", "test"):
        if not splits[name]:
            hint = f" (other splits: {examples(others)})" if others else ""
            raise DataError(f"{source.file}: must have {name} images, got none{hint}")
    annotations = Annotations(
        source.folder, splits["train"], splits["val"], splits["test"], file=source.file, other_splits=others
    )
    return carve_val(annotations, val_ids) if val_ids and not annotations.val else annotations


def require_selection(config: Config, annotations: Annotations) -> None:
    """Raise `DataError` if the data set has no split to select on."""
    if config.eval.select_on == "val" and not annotations.val:
        raise DataError(
            f"{annotations.folder}: has no val split to select on; set data.val_ids=200 to hold out 200 training "
            "identities, or eval.select_on=test as the papers do"
        )


def odd_splits(rows: Iterable[Any]) -> tuple[list[str], list[str]]:
    """Misspelt split names with their meaning, and other unknown ones; each with its number of annotations."""
    names = Counter(row["split"] for row in rows if isinstance(row, dict) and isinstance(row.get("split"), str))
    misspelt, others = [], []
    for name, count in names.items():
        if name not in SPLITS and name.strip():
            counted = f"{name!r} ({count} annotation{'s' * (count != 1)}"
            meant = meant_split(name)
            misspelt += [f"{counted}; did you mean {meant!r}?)"] if meant else []
            others += [] if meant else [f"{counted})"]
    return misspelt, others


def meant_split(name: str) -> str | None:
    """The split of a misspelt name such as `Training`, `valid`, `test ` or `tset`; None for other words."""
    word = name.strip().casefold()
    contained = [split for split in SPLITS if split in word]
    return next(iter(contained or difflib.get_close_matches(word, SPLITS, n=1)), None)


def join_rows(rows: Iterable[Record]) -> list[Record]:
    """One record per image, with the captions of all its rows, in the order of their first rows.

    Rows of an image that differ in identity or split make several records; see `torn_images`.
    """
    same: dict[tuple[str, int, str], list[Record]] = defaultdict(list)
    for row in rows:
        same[row.image_path, row.pid, row.split].append(row)
    return [rows[0] if len(rows) == 1 else _joined(rows) for rows in same.values()]


def _joined(rows: Sequence[Record]) -> Record:
    captions = tuple(caption for row in rows for caption in row.captions)
    attributes: tuple[Mapping[str, str], ...] = ()
    if any(row.attributes for row in rows):
        attributes = tuple(phrases for row in rows for phrases in row.attributes or ({},) * len(row.captions))
    return replace(rows[0], captions=captions, attributes=attributes)


def torn_images(records: Iterable[Record]) -> list[str]:
    """Images with several identities or splits, which are listed behind the path."""
    homes: dict[str, list[str]] = defaultdict(list)
    for record in records:
        homes[record.image_path].append(f"id {record.pid} in {record.split}")
    return [f"{path} ({examples(several)})" for path, several in homes.items() if len(several) > 1]


def examples(cases: Sequence[str]) -> str:
    """The first few of many cases, for a message."""
    more = len(cases) - MAX_EXAMPLES
    return ", ".join(cases[:MAX_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


def _numbered(records: Iterable[Record]) -> list[Record]:
    return [replace(record, image_id=number) for number, record in enumerate(records)]


def carve_val(annotations: Annotations, num_ids: int) -> Annotations:
    """Move identities from train to val: always the same ones, whatever the seed and the library versions.

    Args:
        annotations: data set without val split.
        num_ids: number of identities to hold out.

    Raises:
        DataError: there are too few training identities.
    """
    pids = sorted(annotations.train_labels, key=lambda pid: hashlib.sha256(str(pid).encode()).digest())
    if num_ids >= len(pids):
        raise DataError(
            f"data.val_ids: must be less than the {len(pids)} training identities of {annotations.folder}, "
            f"got {num_ids}; lower it, or set eval.select_on=test"
        )
    held_out = set(pids[:num_ids])
    train = _numbered(record for record in annotations.train if record.pid not in held_out)
    val = _numbered(replace(record, split="val") for record in annotations.train if record.pid in held_out)
    return replace(annotations, train=train, val=val, carved_ids=num_ids)


def count_split(records: Iterable[Record]) -> tuple[int, int, int]:
    """Number of identities, images and captions."""
    records = list(records)
    return len({record.pid for record in records}), len(records), sum(len(record.captions) for record in records)


@ADAPTERS.register("cuhk_pedes")
def cuhk_pedes(root: Path) -> Source:
    """CUHK-PEDES (Li et al., CVPR 2017), also in IVT's edition with attributes and one annotation per caption."""
    return read_annotations(root / "CUHK-PEDES", ["reid_raw.json", "cuhk_pedes_att.json"])


@ADAPTERS.register("icfg_pedes")
def icfg_pedes(root: Path) -> Source:
    """ICFG-PEDES (Ding et al., https://arxiv.org/abs/2107.12666), without val split; the file has two names in use."""
    return read_annotations(root / "ICFG-PEDES", ["ICFG-PEDES.json", "ICFG_PEDES.json"])


@ADAPTERS.register("rstpreid")
def rstpreid(root: Path) -> Source:
    """RSTPReid (Zhu et al., ACM MM 2021), with `img_path` in place of `file_path`."""
    return read_annotations(root / "RSTPReid", ["data_captions.json"])


@ADAPTERS.register("synthetic")
def synthetic(root: Path) -> Source:
    """Rendered pedestrians in the layout of CUHK-PEDES, drawn on first use in `data` or a root that exists."""
    if not root.is_dir() and str(root) != DataConfig.root:  # perhaps a misspelt path
        raise DataError(
            f"{in_full(root)}: no such data root to render the synthetic data set in; create it, or change data.root"
        )
    try:
        folder = render_dataset(root)
    except OSError as error:
        raise DataError(f"{root}: cannot render the synthetic data set there ({error}); change data.root") from None
    return read_annotations(folder, ["reid_raw.json"], get_it=f"delete {folder} to render it again")


def read_record(source: Source, number: int) -> Record:
    """One annotation as a record with image_id 0.

    Args:
        source: data set.
        number: index of the annotation.

    Raises:
        DataError: a field is missing or of the wrong type, or the image lies outside the data set.
    """
    row, where = source.rows[number], f"{source.file}: annotation {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a mapping with split, id, file_path and captions, got {type(row).__name__}")
    path_field = "img_path" if "img_path" in row else "file_path"
    if missing := missing_fields(row):
        raise DataError(f"{where} has no {', '.join(missing)}; {description(row)}; {advice(source.file.name)}")
    split, pid, name, captions = row["split"], row["id"], row[path_field], row["captions"]
    attributes = row.get("att")
    if isinstance(captions, str) and attributes is not None:
        captions = [captions]  # IVT's edition has one row per caption
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: {path_field} must be the path of an image below imgs/, got {name!r}")
    where += f" ({name})"
    if not isinstance(split, str) or not split.strip():
        raise DataError(f"{where}: split must be train, val or test, got {split!r}")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid.bit_length() > 63:
        raise DataError(f"{where}: id must be a 64-bit integer, got {pid!r}")
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise DataError(f"{where}: captions must be a non-empty list of texts")
    if attributes is not None and not (
        isinstance(attributes, dict) and all(isinstance(text, str) for pair in attributes.items() for text in pair)
    ):
        raise DataError(f"{where}: att must be a mapping of names to phrases")
    windows = PureWindowsPath(name)  # accepts both kinds of separators
    if windows.anchor or ".." in windows.parts:
        raise DataError(f"{where}: {path_field} must lie inside the data set")
    split = split if split in ("train", "test") else "val"
    phrases = () if attributes is None else (attributes,) * len(captions)
    return Record(str(below(source.folder / "imgs", name)), pid, 0, tuple(captions), split, phrases)
