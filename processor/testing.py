"""Evaluation of a run or of weights from elsewhere: build, load, encode, rank, print."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.schema import Config, InitConfig
from datasets.annotations import Annotations, load_annotations
from datasets.loaders import build_eval_loaders, data_tokenizer, text_notes
from datasets.presence import require_images
from datasets.text.tokenizers import LEARNT, TextTokenizer
from datasets.workers import worker_notes
from model.build import build_task
from model.task import RetrievalTask
from processor.downloads import require_downloads
from processor.evaluator import Embeddings, embed, metrics_table, warn
from processor.run_folder import run_config
from utils.distributed import default_device
from utils.errors import ConfigError, DataError
from utils.logger import LOGGER
from utils.metrics import Ranking, best_items, similarity_chunks
from utils.paths import in_full

NAMED = ("best", "last", "best_ema")  # checkpoints of a run


def evaluate(arguments: argparse.Namespace, given: Config | None) -> dict[str, dict[str, float]]:
    """Evaluate the chosen weights and print the table; returns row -> metric -> percent.

    Args:
        arguments: command line of test.py.
        given: config of --config with the weights of --weights; None for a run.
    """
    config, task, source = load_task(arguments, given)
    names = arguments.on or [config.data.dataset]
    if arguments.dump and len(names) > 1:
        raise ConfigError(f"--dump: takes one data set, got {len(names)}; name one with --on")
    val_ids = config.carved_val_ids if arguments.split == "val" else 0
    chosen = {name: load_annotations(name, config.data.root, val_ids=val_ids) for name in names}
    for annotations in chosen.values():
        if not annotations.split(arguments.split):
            raise DataError(f"{annotations.folder}: has no {arguments.split} split")
        require_images(annotations, [arguments.split], config.data)
    trained_on = chosen.get(config.data.dataset)
    if trained_on is None and config.data.tokenizer in (None, LEARNT):  # the tokenizer comes from that data set
        trained_on = load_annotations(config.data.dataset, config.data.root)
    folder, encoder = trained_on.folder if trained_on else Path(), task.encoder
    tokenizer = data_tokenizer(
        config.data, folder, most=encoder.vocab_size, kinds=encoder.tokenizers, learn_from=trained_on
    )
    for name, annotations in chosen.items():
        for note in text_notes(config.data, tokenizer, annotations.split(arguments.split), f"{name} {arguments.split}"):
            LOGGER.info("%s", note)

    task.to(default_device())
    rows: dict[str, dict[str, float]] = {}
    for name, annotations in chosen.items():
        rankings = rank(arguments, config, task, annotations, tokenizer)
        label = f" {name}" if arguments.on else ""
        rows |= {direction + label: ranking.summary() for direction, ranking in rankings.items()}
    LOGGER.info("%s, %s split\n%s", source, arguments.split, metrics_table(rows))
    return rows


def load_task(arguments: argparse.Namespace, given: Config | None) -> tuple[Config, RetrievalTask, str]:
    """The config, the task with its weights, and a description of the weights; arguments as `evaluate`."""
    if given is None:
        config = run_config(arguments.run, arguments.set)
        path = checkpoint_path(arguments.run, arguments.checkpoint or "best")
        config = dataclasses.replace(config, init=InitConfig(path=str(path), format="own"))
    else:
        config = given
    require_downloads(config)
    task = build_task(config)
    for note in (*task.notes, *worker_notes(config.data)):
        if not (arguments.run and note.startswith("weights from ")):  # a run's weights fit: the table would say nothing
            LOGGER.info("%s", note)
    return config, task, task.weights_from or f"{config.name} before training"


def checkpoint_path(run: Path, name: str) -> Path:
    """The path that --checkpoint means: a name in the run folder, with or without `.pt`, or a path."""
    stem = name.removesuffix(".pt")
    named = run / f"{stem}.pt"
    if name in NAMED or (not Path(name).exists() and (stem in NAMED or named.exists())):
        return named
    return Path(name)


def rank(
    arguments: argparse.Namespace,
    config: Config,
    task: RetrievalTask,
    annotations: Annotations,
    tokenizer: TextTokenizer,
) -> dict[str, Ranking]:
    """Encode and rank the chosen split of one data set; returns direction -> ranking. Writes the dump if asked."""
    device = default_device()
    loaders = build_eval_loaders(
        config.data,
        annotations.split(arguments.split),
        tokenizer,
        batch_size=config.eval.batch_size,
        pin_memory=device.type != "cpu",
    )
    embeddings = embed(task.encoder, loaders, device, config.train.precision)
    rankings = {"t2i": embeddings.rank_images()}
    warn(embeddings, rankings["t2i"], arguments.split)
    if task.encoder.embeddings:
        split = embeddings.split(task.encoder.embeddings)
        rankings |= {f"t2i {name} only": alone.rank_images() for name, alone in split.items()}
    if arguments.i2t:
        rankings["i2t"] = embeddings.rank_captions()
    if arguments.dump:
        write_dump(arguments.dump, dump_lines(embeddings, rankings["t2i"]))
    return rankings


def dump_lines(embeddings: Embeddings, ranking: Ranking, top: int = 10) -> Iterator[dict[str, Any]]:
    """One record per caption, in annotation order: rank of the first match, AP, INP and the first images."""
    chunks = similarity_chunks(embeddings.query, embeddings.gallery)
    best = ((row, items) for scores in chunks for row, items in zip(scores, best_items(scores, top), strict=True))
    for number, ((record, caption, _), (scores, items)) in enumerate(zip(embeddings.pairs, best, strict=True)):
        images = [embeddings.records[place] for place in items.tolist()]
        yield {
            "caption": caption,
            "pid": record.pid,
            "image": record.image_path,
            "rank": int(ranking.first_rank[number]),
            "AP": float(ranking.average_precision[number]),
            "INP": float(ranking.inverse_negative_penalty[number]),
            "top": [
                {"image": image.image_path, "pid": image.pid, "score": score}
                for image, score in zip(images, scores[items].tolist(), strict=True)
            ],
        }


def write_dump(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    try:
        # JSON spells half a surrogate pair as Python's backslash escape does.
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise ConfigError(f"--dump {in_full(path)}: cannot be written ({error})") from None
    LOGGER.info("ranks written to %s", path)
