"""The annotation file of a data set folder, as a list; a missing or foreign file is told by what is there instead."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets.forms import BYTES_READ, NO_SPLITS, advice, description, form_of, kind_of
from utils.errors import DataError
from utils.paths import in_full, why_not_a_file

GET_IT = "get the data set from its authors (docs/data.md)"
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".gz", ".zip", ".pkl", ".pickle", ".parquet", ".xml", ".mat")
MOST_OTHERS = 5  # files described in place of a missing one
LARGEST = 500 * 2**20  # bytes of a file that is read to be described
FIELDS = ("split", "id", "file_path", "captions")


class Source(NamedTuple):
    """A data set on disk."""

    folder: Path  # holds the images in imgs/
    file: Path  # annotation file
    rows: list[Any]  # annotations, unchecked


def read_annotations(folder: Path, names: Sequence[str], get_it: str = GET_IT) -> Source:
    """Read the first of the files `names` in a folder.

    Args:
        folder: folder of the data set.
        names: file names in use, the published one first.
        get_it: advice for a missing file.

    Raises:
        DataError: there is no such folder or file, or it holds no list; the message names the form of what is there.
    """
    if not folder.is_dir():
        raise DataError(f"{in_full(folder)}: no such data set folder; {get_it}, or change data.root")
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        where = in_full(folder / " or ".join(names))
        there = "".join(f"; {other}" for other in _others(folder, names[0]))
        raise DataError(f"{where}: no such annotation file{there}; {get_it}, or change data.root")
    if kind := why_not_a_file(path):
        raise DataError(f"{path}: must be a JSON file, got {kind}")
    try:
        content = _read(path)
    except (OSError, ValueError, RecursionError) as error:
        kind = _kind(path)
        raise DataError(
            f"{path}: not a readable JSON file ({kind or error})" + (f"; {advice(path.name)}" if kind else "")
        ) from None
    if isinstance(content, dict):
        raise DataError(
            f"{path}: must be a list of annotations, got a mapping, {description(content, whole_file=True)}; "
            f"{advice(path.name)}"
        )
    if not isinstance(content, list):
        raise DataError(f"{path}: must be a list of annotations, got {type(content).__name__}")
    return Source(folder, path, content)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _kind(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(BYTES_READ))
    except OSError:
        return None


def _others(folder: Path, official: str) -> list[str]:
    """Descriptions of the files that may be meant for the missing one, in the folder and in those below it."""
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in SUFFIXES)
    files = [path for path in files if path.relative_to(folder).parts[0] != "imgs" and path.is_file()]
    more = len(files) - MOST_OTHERS
    lines = [f"{path.relative_to(folder)} is there: {_what(path, official)}" for path in files[:MOST_OTHERS]]
    return [*lines, f"and {more} other files"] if more > 0 else lines


def _what(path: Path, official: str) -> str:
    """Description of a file under another name, and what to do with it."""
    try:
        content = _read(path) if path.suffix == ".json" and path.stat().st_size <= LARGEST else None
    except (OSError, ValueError, RecursionError):
        content = None
    row = content[0] if isinstance(content, list) and content else content
    if isinstance(row, dict):
        if isinstance(content, list) and not missing_fields(row):
            return f"it has the form of {official}; rename it if it holds all splits"
        if isinstance(content, list) and form_of(row) == NO_SPLITS:
            return f"{NO_SPLITS}; {official} is needed, which has them"
        return f"{description(row, whole_file=isinstance(content, dict))}; {official} is needed"
    return f"{_kind(path) or 'no annotations'}; {official} is needed"


def missing_fields(row: dict[str, Any]) -> list[str]:
    """Fields that an annotation lacks; the path of the image may be called `img_path`."""
    return [name for name in FIELDS if name not in row and not (name == "file_path" and "img_path" in row)]
