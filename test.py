"""Evaluate a run, or anyone's weights: `python test.py --run runs/cuhk_pedes/20260101_120000_irra --on rstpreid`."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.schema import Config, load_config
from datasets.annotations import Annotations, Record, load_annotations
from datasets.loaders import build_eval_loaders, data_tokenizer
from datasets.text.tokenizers import TextTokenizer
from model.build import build_task
from model.load import load_init, load_weights
from model.task import RetrievalTask
from processor.evaluator import Embeddings, embed, metrics_table
from processor.resume import run_config
from utils.distributed import default_device
from utils.errors import ConfigError, DataError
from utils.exit import exit_on_user_error
from utils.logger import LOGGER, start_logging
from utils.metrics import Ranking


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a run folder of train.py, or weights from elsewhere.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="a run folder")
    what.add_argument("--config", type=Path, help="a YAML file; alone: the weights that training would start from")
    parser.add_argument("--checkpoint", help="with --run: best, last, best_ema, or a path; default: best")
    parser.add_argument("--weights", type=Path, metavar="PATH", help="with --config: a checkpoint, ours or published")
    parser.add_argument("--format", help="of --weights, for instance irra; default: recognised")
    parser.add_argument("--on", nargs="+", metavar="DATASET", help="data sets to test on; default: the config's")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="default: test")
    parser.add_argument("--i2t", action="store_true", help="also rank captions for each image")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write one JSON line per caption: its rank, AP, INP")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config"
    )
    arguments = parser.parse_args()
    with exit_on_user_error():
        start_logging()
        evaluate(arguments)


def evaluate(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The metrics of the chosen weights, data sets and split, printed as a table; row -> metric -> percent."""
    config, task, source = load_task(arguments)
    names = arguments.on or [config.data.dataset]
    if arguments.dump and len(names) > 1:
        raise ConfigError("--dump: takes one data set; name one with --on")
    val_ids = config.val_ids if arguments.split == "val" else 0
    chosen = {name: load_annotations(name, config.data.root, val_ids=val_ids) for name in names}
    for annotations in chosen.values():
        if not annotations.split(arguments.split):
            raise DataError(f"{annotations.folder}: has no {arguments.split} split")
    home = chosen.get(config.data.dataset)
    if home is None and config.data.tokenizer is None:  # it lies in the folder of the data set that was trained on
        home = load_annotations(config.data.dataset, config.data.root)
    folder, encoder = home.folder if home else Path(), task.encoder
    tokenizer = data_tokenizer(config.data, folder, most=encoder.vocab_size, kinds=encoder.tokenizers)

    task.to(default_device())
    rows: dict[str, dict[str, float]] = {}
    for name, annotations in chosen.items():
        rankings = rank(arguments, config, task, annotations, tokenizer)
        label = f" {name}" if arguments.on else ""
        rows |= {direction + label: ranking.summary() for direction, ranking in rankings.items()}
    LOGGER.info("%s, %s split\n%s", source, arguments.split, metrics_table(rows))
    return rows


def load_task(arguments: argparse.Namespace) -> tuple[Config, RetrievalTask, str]:
    """The config, the encoder with its weights in it, and a line that says which weights these are."""
    if arguments.run:
        if arguments.weights or arguments.format:
            raise ConfigError("--weights, --format: belong to --config; with --run, --checkpoint names a checkpoint")
        config = run_config(arguments.run, arguments.set)
        name = arguments.checkpoint or "best"
        weights, format = arguments.run / f"{name}.pt" if name in ("best", "last", "best_ema") else Path(name), "own"
    else:
        if arguments.checkpoint:
            raise ConfigError("--checkpoint: belongs to --run; with --config, --weights names a checkpoint")
        config, weights, format = load_config(arguments.config, arguments.set), arguments.weights, arguments.format
        if format and not weights:
            raise ConfigError("--format: is the format of --weights, which is not given")
    task = build_task(config, None, pretrained=weights is None)
    report = load_weights(task, weights, format=format) if weights else load_init(task, config.init)
    for note in task.encoder.notes:
        LOGGER.info("%s", note)
    if report is None:
        return config, task, f"{config.name} before training"
    if not arguments.run:
        LOGGER.info("%s", report.table())
    return config, task, report.source if report.epoch is None else f"{report.source}, epoch {report.epoch}"


def rank(
    arguments: argparse.Namespace,
    config: Config,
    task: RetrievalTask,
    annotations: Annotations,
    tokenizer: TextTokenizer,
) -> dict[str, Ranking]:
    """Embed the chosen split of one data set and rank it; direction -> ranking. Writes the dump where one is asked."""
    records, device = annotations.split(arguments.split), default_device()
    loaders = build_eval_loaders(
        config.data, records, tokenizer, batch_size=config.eval.batch_size, pin_memory=device.type != "cpu"
    )
    embeddings = embed(task.encoder, loaders, device, config.train.precision)
    rankings = {"t2i": embeddings.rank_images()}
    if rankings["t2i"].num_unmatched:
        LOGGER.warning("%d captions show nobody of the gallery; left out", rankings["t2i"].num_unmatched)
    if task.encoder.embeddings:
        parts = embeddings.parts(task.encoder.embeddings)
        rankings |= {f"t2i {name} only": part.rank_images() for name, part in parts.items()}
    if arguments.i2t:
        rankings["i2t"] = embeddings.rank_captions()
    if arguments.dump:
        skipped = set(loaders.images.unreadable())
        gallery = [record for record in records if record.image_path not in skipped]
        write_dump(arguments.dump, dump_lines(records, gallery, rankings["t2i"], embeddings))
    return rankings


def dump_lines(
    records: list[Record], gallery: list[Record], ranking: Ranking, embeddings: Embeddings, top: int = 10
) -> Iterator[dict[str, Any]]:
    """One record per caption, in annotation order: its rank (of the first match), AP, INP and the first images."""
    captions = [(record, caption) for record in records for caption in record.captions]
    for number, (record, caption) in enumerate(captions):
        scores = embeddings.gallery @ embeddings.query[number]
        best = scores.sort(descending=True, stable=True).indices[:top].tolist()
        yield {
            "caption": caption,
            "pid": record.pid,
            "image": record.image_path,
            "rank": int(ranking.first_rank[number]),
            "AP": float(ranking.average_precision[number]),
            "INP": float(ranking.inverse_negative_penalty[number]),
            "top": [{"image": gallery[i].image_path, "pid": gallery[i].pid, "score": float(scores[i])} for i in best],
        }


def write_dump(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise ConfigError(f"--dump {path}: cannot be written ({error})") from None
    LOGGER.info("ranks written to %s", path)


if __name__ == "__main__":
    main()
