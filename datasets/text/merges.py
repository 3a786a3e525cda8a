"""CLIP's merges file: where installed packages have a copy of the published one."""

from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from utils.integrity import file_hash

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES_URL = f"https://github.com/openai/CLIP/raw/main/clip/{MERGES_FILE}"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
PACKAGES = ("open_clip", "clip", "alpha_clip", "longclip", "mobileclip", "lavis", "imagebind", "ultralytics")
OPENAI = "openai/clip-vit-"  # repositories on the hub whose tokenizer has these merges


@cache
def installed_merges() -> Path | None:
    """The published file in an installed package, none of which is imported; None if no package has it."""
    copies = (path for name in PACKAGES for folder in _folders(name) for path in folder.rglob(MERGES_FILE))
    others = (
        Path(str(file.locate()))
        for package in distributions()
        for file in package.files or ()
        if file.name == MERGES_FILE
    )
    return next((path for found in (copies, others) for path in found if _is_published(path)), None)


def _folders(package: str) -> list[Path]:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _is_published(path: Path) -> bool:
    try:
        return path.is_file() and file_hash(path) == SHA256
    except OSError:
        return False
