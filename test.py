"""Evaluate a trained run: `python test.py --run runs/synthetic/20260101_120000_synthetic --i2t`."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.schema import load_config
from datasets.annotations import Record, load_annotations
from datasets.loaders import build_eval_loaders, data_tokenizer
from model.task import build_encoder
from processor.evaluator import Embeddings, embed, metrics_table
from utils.checkpoint import load_checkpoint, load_state
from utils.distributed import default_device
from utils.errors import CheckpointError, ConfigError, DataError, exit_on_user_error
from utils.logger import LOGGER, start_logging
from utils.metrics import Ranking


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a run folder that train.py made.")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--checkpoint", default="best", help="best, last, or the path of a checkpoint; default: best")
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
    """The metrics of the chosen checkpoint and split, printed as a table; direction -> metric -> percent."""
    if not (arguments.run / "config.yaml").is_file():
        raise ConfigError(f"{arguments.run}: no run folder (there is no config.yaml in it)")
    config = load_config(arguments.run / "config.yaml", arguments.set)
    named = {"best": arguments.run / "best.pt", "last": arguments.run / "last.pt"}
    checkpoint = named.get(arguments.checkpoint, Path(arguments.checkpoint))
    content = load_checkpoint(checkpoint)
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{checkpoint}: no checkpoint of this project (it has no 'model')")

    device = default_device()
    encoder = build_encoder(config, pretrained=False)
    prefix = "encoder."
    state = {name.removeprefix(prefix): value for name, value in content["model"].items() if name.startswith(prefix)}
    load_state(encoder, state, checkpoint)
    encoder.to(device)

    annotations = load_annotations(config.data.dataset, config.data.root)
    records = annotations.split(arguments.split)
    if not records:
        raise DataError(f"{annotations.folder}: has no {arguments.split} split")
    loaders = build_eval_loaders(
        config.data,
        records,
        data_tokenizer(config.data, annotations),
        batch_size=config.eval.batch_size,
        pin_memory=device.type != "cpu",
    )
    embeddings = embed(encoder, loaders, device, config.train.precision)
    rankings = {"t2i": embeddings.rank_images()}
    if arguments.i2t:
        rankings["i2t"] = embeddings.rank_captions()
    results = {direction: ranking.summary() for direction, ranking in rankings.items()}
    LOGGER.info("%s, %s split, epoch %s\n%s", checkpoint, arguments.split, content.get("epoch"), metrics_table(results))
    if arguments.dump:
        skipped = set(loaders.images.unreadable())
        gallery = [record for record in records if record.image_path not in skipped]
        write_dump(arguments.dump, dump_lines(records, gallery, rankings["t2i"], embeddings))
    return results


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
