"""Check data sets on disk: `python -m tools.check_dataset cuhk_pedes rstpreid --root data`."""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from configs.arguments import Parser, positive
from configs.schema import Config, DataConfig, load_config
from datasets.annotations import ADAPTERS, SPLITS, Annotations, Record, count_split
from datasets.images import MISSING, read_header, read_image
from datasets.text.tokenizers import clean
from datasets.workers import num_workers
from tools import dataset_checks as checks
from tools.dataset_checks import LEVELS, OFFICIAL, Finding, Look, Seen, Text
from tools.training_checks import training_findings
from utils.errors import ConfigError, DataError
from utils.exit import exit_on_user_error
from utils.logger import format_table
from utils.paths import expand, expanded, in_full

CLIP = "openai/clip-vit-base-patch16"  # value of data.tokenizer
HEADER = ("split", "ids", "images", "captions", "official", "captions per image", "images per id", "R@1 ceiling")


@dataclass(frozen=True)
class SplitSummary:
    """Counts of a split; (least, most) for numbers per image or identity, None if unknown."""

    ids: int
    images: int
    captions: int
    official: checks.Counts | None
    captions_per_image: tuple[int, int] | None
    images_per_id: tuple[int, int] | None
    r1_ceiling: float | None


@dataclass(frozen=True)
class Report:
    """Result of the check of one data set; without splits if it has no annotations."""

    name: str
    splits: dict[str, SplitSummary]
    findings: list[Finding]

    @property
    def would_train(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)


def main() -> None:
    parser = Parser(description="Find faults and oddities of data sets on disk.")
    parser.add_argument(
        "datasets", nargs="*", metavar="DATASET", help=f"any of {', '.join(ADAPTERS)}; default: the config's"
    )
    parser.add_argument("--config", type=expand, help="YAML file: also check what train.py would refuse with it")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="with --config: override it"
    )
    parser.add_argument("--root", type=expand, help="the data root; default: the config's, or data")
    parser.add_argument("--json", type=expand, metavar="FILE", help="also write the findings as JSON")
    parser.add_argument(
        "--tokenizer",
        type=expanded,
        help="value of data.tokenizer; default: the config's, or CLIP's",
    )
    parser.add_argument("--text-length", type=positive, help="tokens of a caption; default: the config's, or 77")
    parser.add_argument("--headers-only", action="store_true", help="do not decode the images (for network disks)")
    parser.add_argument("--workers", type=positive, help="threads that read images; default: one per core, at most 8")
    with exit_on_user_error():
        options = parser.parse_args()
        if not (options.datasets or options.config):
            parser.error("a data set or --config is required")
        if options.set and not options.config:
            raise ConfigError("--set: needs --config")
        names = dict.fromkeys(options.datasets) or [load_config(options.config, options.set).data.dataset]
        for name in names:
            ADAPTERS.get(name, "data set")
        seen: Seen = {}
        reports = []
        for name in names:
            reports.append(check(config_of(options, name), options, seen))
            show(reports[-1])
        if options.json:
            write_json(options.json, reports)
        if not all(report.would_train for report in reports):
            sys.exit(1)


def config_of(options: argparse.Namespace, name: str) -> Config:
    """The config that a data set is checked for: that of --config, or defaults with CLIP's tokenizer."""
    config = Config()
    if options.config:
        from processor.resolve import resolve  # slow to import

        config = resolve(load_config(options.config, options.set))
    given = {"root": options.root and str(options.root), "text_length": options.text_length}
    data = replace(config.data, dataset=name, **{key: value for key, value in given.items() if value})
    if options.tokenizer or not options.config:
        own = None if name == "synthetic" else CLIP
        data = replace(data, tokenizer=options.tokenizer or own)
    return replace(config, data=data)


def check(config: Config, options: argparse.Namespace, seen: Seen) -> Report:
    """Check one data set, and look for its images among those of other data sets.

    Args:
        config: config that the data set is checked for.
        options: command line options.
        seen: images of the data sets checked before; those of this one are added.
    """
    name = config.data.dataset
    try:
        source = ADAPTERS.get(name, "data set")(Path(config.data.root))
    except DataError as error:
        return Report(name, {}, [Finding("error", "no_annotations", str(error), 1, [])])
    records, findings = checks.read_records(source)
    splits = {split: [record for record in records if record.split == split] for split in SPLITS}
    texts = [Text(record, caption, clean(caption)) for record in records for caption in record.captions]
    looks = look_at_all(name, source.folder, [record.image_path for record in records], options)

    findings += checks.split_findings(name, splits)
    sound = all(finding.level != "error" for finding in findings)
    findings += checks.unreadable_findings(looks, skipped=config.data.on_bad_image == "skip")
    findings += checks.odd_image_findings(looks)
    findings += checks.duplicate_findings(records, looks)
    findings += checks.other_set_findings(name, records, looks, seen)
    findings += checks.identity_findings(splits)
    findings += checks.caption_findings(texts)
    annotations = Annotations(source.folder, splits["train"], splits["val"], splits["test"])
    findings += training_findings(config, annotations, texts, sound=sound, model=bool(options.config))
    if options.headers_only:
        message = "images of which only the header was read: truncation is not detected, contents were not compared"
        findings.append(Finding("note", "headers_only", message, len(looks), []))
    summaries = {split: summarize(name, split, splits[split], texts) for split in SPLITS}
    return Report(name, summaries, sorted(findings, key=lambda finding: LEVELS.index(finding.level)))


def look_at_all(name: str, folder: Path, paths: Iterable[str], options: argparse.Namespace) -> dict[str, Look]:
    """Read each image once. Threads are as fast as processes, because decoding releases the interpreter lock."""
    unique = list(dict.fromkeys(paths))
    look = partial(look_at, folder, headers_only=options.headers_only)
    with ThreadPool(options.workers or num_workers(DataConfig())) as pool:
        looks = tqdm(pool.imap(look, unique, chunksize=32), name, len(unique), unit="image", disable=None)
        return dict(zip(unique, looks, strict=True))


def look_at(folder: Path, path: str, *, headers_only: bool) -> Look:
    """Read an image as training does, and hash its bytes; `headers_only` does not decode it."""
    file = folder / path
    if not os.path.exists(file):
        return Look(fault=MISSING)
    try:
        header = read_header(str(file))
        if headers_only:
            return Look(header)
        read_image(str(file))
        return Look(header, digest=hashlib.sha256(file.read_bytes()).digest())
    except (DataError, OSError) as error:
        return Look(fault=str(error).removeprefix(f"{in_full(file)}: ").replace(f"{folder}{os.sep}", ""))


def summarize(name: str, split: str, records: Sequence[Record], texts: Iterable[Text]) -> SplitSummary:
    queries = [(text.clean, text.record.pid) for text in texts if text.record.split == split]
    return SplitSummary(
        *count_split(records),
        official=OFFICIAL[name][split] if name in OFFICIAL else None,
        captions_per_image=least_and_most([len(record.captions) for record in records]),
        images_per_id=least_and_most(Counter(record.pid for record in records).values()),
        r1_ceiling=checks.r1_ceiling(queries) if queries and split != "train" else None,
    )


def least_and_most(counts: Collection[int]) -> tuple[int, int] | None:
    return (min(counts), max(counts)) if counts else None


def show(report: Report) -> None:
    """Print the table of splits, the findings with their examples, and the verdict."""
    lines = [""]
    if report.splits:
        lines.append(format_table(HEADER, [table_row(split, summary) for split, summary in report.splits.items()]))
    for finding in report.findings:
        lines.append(f"{finding.level:<7} {finding.count:>7}  {finding.message}")
        lines += [f"{'':17}  {example}" for example in finding.examples]
    levels = Counter(finding.level for finding in report.findings)
    verdict = ", ".join(f"{levels[level]} {level}{'s' * (levels[level] != 1)}" for level in LEVELS)
    lines.append(f"{report.name}: {verdict}: {'would train' if report.would_train else 'training would fail'}")
    print("\n".join(lines))


def table_row(split: str, summary: SplitSummary) -> list[object]:
    counts = (summary.ids, summary.images, summary.captions)
    differs = summary.official not in (None, counts)
    ranges = (summary.captions_per_image, summary.images_per_id)
    return [
        split,
        *counts,
        checks.format_counts(summary.official) + " (differs)" * differs if summary.official else "",
        *("-".join(map(str, dict.fromkeys(ends or ()))) for ends in ranges),
        "" if summary.r1_ceiling is None else summary.r1_ceiling,
    ]


def write_json(path: Path, reports: Iterable[Report]) -> None:
    content = {report.name: {**asdict(report), "would_train": report.would_train} for report in reports}
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error})") from None


if __name__ == "__main__":
    main()
