"""Search for the image files of a data set, before a run computes anything."""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from configs.schema import DataConfig
from datasets.annotation_files import GET_IT
from datasets.annotations import Annotations, examples
from utils.errors import DataError
from utils.paths import in_full, why_not_a_file

THREADS = 32  # network disks answer many questions at once


def require_images(annotations: Annotations, splits: Iterable[str], config: DataConfig) -> None:
    """Look for every image of the splits that a run uses.

    Args:
        annotations: data set.
        splits: names of the splits.
        config: data settings; with `on_bad_image: skip` a single image suffices.

    Raises:
        DataError: the image folder or an image is missing, or an image is a pipe, a device or a folder.
    """
    paths = list(dict.fromkeys(record.image_path for split in splits for record in annotations.split(split)))
    with ThreadPool(THREADS) as pool:
        present = pool.map(_is_there, paths, chunksize=256)
    missing = [path for path, there in zip(paths, present, strict=True) if not there]
    if not missing or (config.on_bad_image == "skip" and len(missing) < len(paths)):
        return
    folder = annotations.folder / "imgs"
    if not folder.is_dir():
        raise DataError(f"{in_full(folder)}: no such image folder; {GET_IT}, or change data.root")
    names = [os.path.relpath(path, folder) for path in missing]
    raise DataError(
        f"{in_full(folder)}: must have all {len(paths)} images of the annotations, got none for {len(missing)}: "
        f"{examples(names)}{_hint(names, folder)}; complete the data set, or set data.on_bad_image=skip"
    )


def _is_there(path: str) -> bool:
    return os.path.exists(path) and why_not_a_file(path) is None


def _hint(names: Sequence[str], folder: Path) -> str:
    """A remark if the folder has files whose names differ only in case, separators or Unicode form."""
    files = (
        os.path.relpath(os.path.join(parent, file), folder) for parent, _, found in os.walk(folder) for file in found
    )
    alike = {_plain(file): file for file in files}
    pairs = [(name, alike[_plain(name)]) for name in names if alike.get(_plain(name), name) != name]
    if not pairs:
        return ""
    name, file = pairs[0]
    return f" ({len(pairs)} differ from a file only in case, separators or Unicode form, as {name!r} from {file!r})"


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
