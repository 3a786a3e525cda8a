"""Annotation files of other projects: recognised by their keys, so that a message can say what they are."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from utils.convert import shortened
from utils.signatures import PACKED

MAX_KEYS = 8
OURS = '[{"split": "train", "id": 1, "file_path": "a.jpg", "captions": ["A man."]}, ...]'
NO_SPLITS = "the form without splits, as in CUHK-PEDES's caption_all.json"
# (name, keys of each annotation); the first one that fits counts
ROWS: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (name, frozenset(keys.split()))
    for name, keys in (
        ("the form of SYNTH-PEDES, without splits", "id file_path captions prompt_caption"),
        (NO_SPLITS, "id file_path captions"),
        (NO_SPLITS, "id img_path captions"),
        ("the form of APTM, RaSa and ALBEF, without splits", "image caption image_id"),
        ("the form of TextReID and ViTAA, with one sentence per annotation", "file_path sentence"),
        ("the form of TextReID and ViTAA, with one sentence per annotation", "file_path onehot"),
        ("LLaVA's conversations", "conversations"),
        ("Karpathy's form of COCO and Flickr30k", "filename sentences"),
        ("COCO's captions", "image_id caption"),
        ("image-text pairs without identities", "image caption"),
        ("image-text pairs without identities", "image text"),
        ("image-text pairs without identities", "url caption"),
    )
)
# The same for a file that is a mapping.
MAPPINGS: tuple[tuple[str, frozenset[str]], ...] = (
    ("COCO's captions", frozenset({"images", "annotations"})),
    ("the form of TextReID and ViTAA", frozenset({"annotations"})),
    ("Karpathy's form of COCO and Flickr30k", frozenset({"images"})),
    *(("a mapping with a list for each split", frozenset({split})) for split in ("train", "test")),
    ("one annotation, or a table by columns", frozenset({"captions"})),
    ("one annotation, or a table by columns", frozenset({"caption"})),
)
BYTES = (
    *((pattern, what) for pattern, what, _ in PACKED),
    (rb"PK\x03\x04", "a zip archive; unpack it first"),
    (rb"\x80[\x02-\x05]", "a pickle, which is not read because it could run code"),
    (rb"PAR1", "a Parquet table"),
    (rb"\s*\{[^\n]*\}\s*\n\s*\{", "JSON lines"),
    (rb"(?i)[\"\w ]+([,;\t])[\"\w ]+(\1[\"\w ]+)*\r?\n", "a table of comma- or tab-separated values"),
)
BYTES_READ = 1 << 16


def form_of(content: Mapping[Any, Any], *, whole_file: bool = False) -> str | None:
    """Name of the known form of an annotation, or of a mapping that is the content of a file."""
    forms = MAPPINGS if whole_file else ROWS
    return next((name for name, keys in forms if keys <= content.keys()), None)


def kind_of(start: bytes) -> str | None:
    """Kind of a file without JSON, by its first bytes."""
    return next((what for pattern, what in BYTES if re.match(pattern, start, re.IGNORECASE)), None)


def listed_keys(content: Iterable[object]) -> str:
    """The keys of a mapping, for a message."""
    keys = [shortened(str(key)) for key in content]
    more = f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
    return ", ".join(keys[:MAX_KEYS]) + more if keys else "none"


def description(content: Mapping[Any, Any], *, whole_file: bool = False) -> str:
    """The keys of a mapping in another form, and the name of the form if it is known."""
    form = form_of(content, whole_file=whole_file)
    return f"its keys are {listed_keys(content)}" + (f": {form}" if form else "")


def advice(official: str) -> str:
    """Advice for another form in place of the file `official`."""
    return f"use {official} of the data set's authors (docs/data.md), or write {OURS}"
