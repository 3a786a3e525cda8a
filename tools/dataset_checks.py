"""Checks of a data set's annotations, captions and images; each one yields findings."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from datasets.annotation_files import missing_fields
from datasets.annotations import (
    MAX_EXAMPLES,
    SPLITS,
    Annotations,
    Record,
    Source,
    count_split,
    join_rows,
    odd_splits,
    read_record,
    torn_images,
)
from datasets.forms import NO_SPLITS, advice, form_of
from datasets.images import MISSING, Header
from datasets.text.tokenizers import TextTokenizer
from utils.errors import DataError
from utils.yaml_text import encodable

LEVELS = ("error", "warning", "note")
MAX_LETTERS = 160

Counts = tuple[int, int, int]  # identities, images, captions
OFFICIAL: dict[str, dict[str, Counts]] = {  # as in IRRA's training logs
    "cuhk_pedes": {"train": (11003, 34054, 68126), "val": (1000, 3078, 6158), "test": (1000, 3074, 6156)},
    "icfg_pedes": {"train": (3102, 34674, 34674), "val": (0, 0, 0), "test": (1000, 19848, 19848)},
    "rstpreid": {"train": (3701, 18505, 37010), "val": (200, 1000, 2000), "test": (200, 1000, 2000)},
}
Seen = dict[bytes, set[tuple[str, str]]]  # digest of an image file -> (data set, split) pairs that contain it


@dataclass(frozen=True)
class Finding:
    """A fault or oddity."""

    level: str  # one of LEVELS
    kind: str  # short, stable name
    message: str
    count: int
    examples: list[str]  # the first cases


class Look(NamedTuple):
    """Result of reading an image: its header, digest of the file if it was read in full, and its fault."""

    header: Header | None = None
    digest: bytes | None = None
    fault: str | None = None


class Text(NamedTuple):
    """A caption as annotated and as the tokenizer sees it (`clean`), with its record."""

    record: Record
    caption: str
    clean: str

    def __str__(self) -> str:
        return f"{self.record.image_path}: {self.clean}"


def found(level: str, kind: str, message: str, cases: Sequence[object]) -> Iterator[Finding]:
    """A finding with the first cases as examples; none without cases."""
    if cases:
        yield Finding(level, kind, message, len(cases), [_printable(str(case)) for case in cases[:MAX_EXAMPLES]])


def _printable(text: str) -> str:
    text = text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 3] + "..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def read_records(source: Source) -> tuple[list[Record], list[Finding]]:
    """Records of the valid annotations, with paths relative to the data set's folder, and findings about all."""
    records, faulty, foreign = [], [], defaultdict(list)
    for number, row in enumerate(source.rows):
        try:
            record = read_record(source, number)
        except DataError as error:
            if form := form_of(row) if isinstance(row, dict) and missing_fields(row) else None:
                foreign[form].append(f"annotation {number}")
            else:
                faulty.append(str(error).removeprefix(f"{source.file}: "))
            continue
        records.append(replace(record, image_path=str(Path(record.image_path).relative_to(source.folder))))
    findings: list[Finding] = []
    for form, rows in foreign.items():
        message = f"annotations in {form}; {advice(source.file.name)}"
        findings += found("error", "no_split" if form == NO_SPLITS else "other_form", message, rows)
    findings += found("error", "faulty_annotation", "annotations that cannot be used", faulty)
    misspelt, others = odd_splits(source.rows)
    findings += found("error", "misspelt_split", "split names that look misspelt, which train.py refuses", misspelt)
    findings += found("warning", "other_split", "split names that count as val", others)
    times = Counter(record.image_path for record in records)
    repeated = [f"{path} ({count} times)" for path, count in times.items() if count > 1]
    findings += found("note", "repeated_path", "images annotated more than once, each one gallery image", repeated)
    records = join_rows(records)
    message = "images whose annotations differ in id or split, which train.py refuses"
    findings += found("error", "torn_image", message, torn_images(records))
    return records, findings


def split_findings(name: str, splits: Mapping[str, list[Record]]) -> Iterator[Finding]:
    """Missing splits, and differences from the official ones."""
    official = OFFICIAL.get(name, {})
    empty = [split for split in ("train", "test") if not splits[split]]
    yield from found("error", "missing_split", "splits without images, which train.py refuses", empty)
    if not splits["val"] and official.get("val") == (0, 0, 0):
        message = "no val split, as published: train.py holds out data.val_ids training identities, "
        yield Finding("note", "no_val", message + "unless eval.select_on=test", 1, [])
    elif not splits["val"]:
        yield Finding("warning", "missing_val", "no val split, although the data set has one", 1, [])
    differing = [
        f"{split}: {format_counts(counts)}, official {format_counts(official[split])}"
        for split, counts in ((split, count_split(splits[split])) for split in official)
        if counts != official[split]
    ]
    yield from found(
        "warning", "official_counts", "splits that differ from the official ones (ids/images/captions)", differing
    )
    if name in ("icfg_pedes", "rstpreid"):
        message = "icfg_pedes and rstpreid were both drawn from MSMT17 with different ids: joint training, or training "
        message += "on one and testing on the other, may show test identities in training"
        yield Finding("note", "msmt17", message, 1, [])


def format_counts(counts: Counts) -> str:
    return "/".join(map(str, counts))


def identity_findings(splits: Mapping[str, list[Record]]) -> Iterator[Finding]:
    """Identities in several splits or with a single image, and relabelled ids."""
    images = {split: Counter(record.pid for record in splits[split]) for split in SPLITS}
    homes: dict[int, list[str]] = defaultdict(list)
    for split in SPLITS:
        for pid in images[split]:
            homes[pid].append(split)
    leaks = [f"id {pid} ({_listed(home)})" for pid, home in homes.items() if len(home) > 1]
    yield from found("warning", "id_in_splits", "identities in several splits", leaks)
    single = [f"id {pid} ({split})" for split in SPLITS for pid, count in images[split].items() if count == 1]
    yield from found("note", "single_image_id", "identities with a single image", single)
    for note in Annotations(Path(), splits["train"], splits["val"], splits["test"]).notes():
        yield Finding("note", "relabelled", note, 1, [])


def unreadable_findings(looks: Mapping[str, Look], *, skipped: bool = False) -> Iterator[Finding]:
    """Missing and unreadable images; with `skipped` (data.on_bad_image), no error unless all are."""
    level = "warning" if skipped and any(look.fault is None for look in looks.values()) else "error"
    advice = "which data.on_bad_image=skip replaces" if skipped else "data.on_bad_image=skip replaces them"
    missing = [path for path, look in looks.items() if look.fault == MISSING]
    yield from found(level, "missing_image", f"missing images ({advice})", missing)
    damaged = [f"{path}: {look.fault}" for path, look in looks.items() if look.fault not in (None, MISSING)]
    yield from found(level, "unreadable_image", f"unreadable images ({advice})", damaged)


def odd_image_findings(looks: Mapping[str, Look]) -> Iterator[Finding]:
    """Images that training does not use as they are stored: other modes than RGB, transparency, orientation."""
    headers = {path: look.header for path, look in looks.items() if look.header}
    for mode in sorted({header.mode for header in headers.values()} - {"RGB"}):
        paths = [path for path, header in headers.items() if header.mode == mode]
        yield from found("note", f"image_mode_{mode}", f"images of mode {mode}, converted to 8-bit RGB", paths)
    transparent = [path for path, header in headers.items() if header.transparent]
    yield from found("note", "transparency", "images with transparency, laid over white", transparent)
    for turn in sorted({header.orientation for header in headers.values()} - {1}):
        paths = [path for path, header in headers.items() if header.orientation == turn]
        yield from found("note", f"orientation_{turn}", f"images of EXIF orientation {turn}, turned upright", paths)


def duplicate_findings(records: Iterable[Record], looks: Mapping[str, Look]) -> Iterator[Finding]:
    """Images in several files, splits or identities, by content if it is known, else by path."""
    same_image: dict[bytes | str, list[Record]] = defaultdict(list)
    for record in records:
        same_image[looks[record.image_path].digest or record.image_path].append(record)
    identical, torn, leaks = [], [], []
    for same in same_image.values():
        paths = dict.fromkeys(record.image_path for record in same)
        pids = sorted({record.pid for record in same})
        homes = [split for split in SPLITS if any(record.split == split for record in same)]
        names = " = ".join(paths)
        identical += [names] * (len(paths) > 1)
        torn += [f"{names} (ids {_listed(pids)})"] * (len(pids) > 1)
        leaks += [f"{names} ({_listed(homes)})"] * (len(homes) > 1)
    yield from found("note", "identical_files", "images stored in several files", identical)
    yield from found("warning", "image_of_several_ids", "images of several identities", torn)
    yield from found("warning", "image_in_splits", "images in several splits", leaks)


def other_set_findings(
    name: str, records: Iterable[Record], looks: Mapping[str, Look], seen: Seen
) -> Iterator[Finding]:
    """Images that another data set contains as well; adds those of this one to `seen`."""
    shared: dict[tuple[str, str, str], dict[bytes, str]] = defaultdict(dict)
    mine = [(digest, record) for record in records if (digest := looks[record.image_path].digest)]
    for digest, record in mine:
        for other, split in seen.get(digest, ()):
            shared[record.split, other, split][digest] = record.image_path
    for (split, other, other_split), paths in sorted(shared.items()):
        message = f"images of {split} that also occur in {other} {other_split}"
        yield from found("warning", "image_in_other_set", message, list(paths.values()))
    for digest, record in mine:
        seen.setdefault(digest, set()).add((name, record.split))


def caption_findings(texts: Sequence[Text]) -> Iterator[Finding]:
    """Captions without text, in another script, with half a letter, or shared by several identities."""
    for split in SPLITS:
        queries = [(text.clean, text.record.pid) for text in texts if text.record.split == split]
        shared = {text: pids for text, pids in _identities_of(queries).items() if len(pids) > 1}
        message = f"texts shared by several identities in {split}"
        if shared and split != "train":
            asked = sum(pids.total() for pids in shared.values())
            message += f": {asked} of {len(queries)} captions; R@1 cannot exceed {r1_ceiling(queries):.2f}"
        cases = [f"{text or '(empty)'} (ids {_listed(sorted(pids))})" for text, pids in shared.items()]
        yield from found("note" if split == "train" else "warning", f"shared_text_{split}", message, cases)
    empty = [text.record.image_path for text in texts if not text.clean]
    yield from found("warning", "empty_caption", "empty captions", empty)
    foreign = [text for text in texts if _has_foreign_letter(text.clean)]
    yield from found("warning", "not_latin", "captions with letters that are not Latin", foreign)
    halved = [text for text in texts if not encodable(text.caption)]
    yield from found("warning", "half_letter", "captions with half a surrogate pair, which is read as U+FFFD", halved)


def r1_ceiling(queries: Sequence[tuple[str, int]]) -> float:
    """Highest R@1, in percent, that any model can reach.

    Queries with the same text get the same ranking, with one identity in front. Of the n_t queries with text t, at most
    the m_t of the most frequent identity succeed. The ceiling is 100 (1 - sum_t (n_t - m_t) / n).

    Args:
        queries: (text, identity), at least one.
    """
    lost = sum(pids.total() - max(pids.values()) for pids in _identities_of(queries).values())
    return 100.0 * (1 - lost / len(queries))


def _identities_of(queries: Iterable[tuple[str, int]]) -> dict[str, Counter[int]]:
    """Text -> number of its queries per identity."""
    identities: dict[str, Counter[int]] = defaultdict(Counter)
    for text, pid in queries:
        identities[text][pid] += 1
    return identities


def _has_foreign_letter(text: str) -> bool:
    if text.isascii():  # the usual case; looking up names takes longer
        return False
    return any(char.isalpha() and "LATIN" not in unicodedata.name(char, "") for char in text)


def token_findings(texts: Sequence[Text], tokenizer: TextTokenizer, text_length: int) -> Iterator[Finding]:
    """Captions longer than `text_length` tokens."""
    lengths = [tokenizer.length(text.caption) for text in texts]
    order = sorted(range(len(texts)), key=lambda number: -lengths[number])
    long = [f"{lengths[i]} tokens: {texts[i]}" for i in order if lengths[i] > text_length]
    message = f"captions over {text_length} tokens (start and end included), which are cut; the longest"
    yield from found("note", "long_caption", message, long)
