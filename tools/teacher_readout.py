"""What support sets are worth: one image and one caption of each person, ranked plain and with a trained fusion.

Support sets are chosen by identity, so the numbers with support use the labels: a sanity check of a teacher, no result.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from datasets.annotations import load_annotations
from datasets.loaders import data_tokenizer
from datasets.pairs import TrainPairs
from datasets.transforms import build_transform
from model.build import build_task
from model.load import load_weights
from model.teacher import CachedTeacher, Teacher
from processor.evaluator import metrics_table
from processor.resume import run_config
from processor.teacher_cache import fill_cache
from utils.batch import to_device
from utils.distributed import default_device
from utils.errors import DataError
from utils.exit import exit_on_user_error
from utils.metrics import retrieval_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run folder; only a fusion's has support")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"], help="default: train")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"], help="default: last")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config"
    )
    arguments = parser.parse_args()
    with exit_on_user_error():
        rows = read_out(arguments.run, arguments.split, arguments.checkpoint, arguments.set)
        print(metrics_table(rows, f"one view, {arguments.split}"))


def read_out(run: Path, split: str, checkpoint: str, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Metrics of the first image and caption of each person of a split, plain and, of a fusion, with support.

    Raises:
        DataError: there is no such split.
    """
    config = run_config(run, overrides)
    task = build_task(config, None, pretrained=False)
    load_weights(task, run / f"{checkpoint}.pt", format="own")
    annotations = load_annotations(config.data.dataset, config.data.root, val_ids=config.val_ids)
    records = annotations.train if split == "train" else annotations.split(split)
    if not records:
        raise DataError(f"{annotations.folder}: has no {split} split")
    device = default_device()
    teacher = CachedTeacher(Teacher(task.encoder)).to(device)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=task.encoder.vocab_size)
    labels = {pid: label for label, pid in enumerate(sorted({record.pid for record in records}))}
    transform = build_transform(config.data, train=False)
    pairs = TrainPairs(records, labels, transform, tokenizer, teacher.inputs, config.train.seed, config.data)
    fill_cache(teacher, pairs, config, device)

    firsts: dict[int, int] = {}  # each person's first pair
    for place, pair in enumerate(pairs.pairs):
        firsts.setdefault(pair.record.pid, place)
    items = [pairs[place] for place in firsts.values()]
    batch = to_device({name: torch.cat([item[name] for item in items]) for name in ("pids", *teacher.inputs)}, device)
    embeddings = {"plain": (teacher.images[batch["index"]], teacher.captions[batch["index"]])}
    if teacher.fusion is not None:
        embeddings["with support"] = teacher(batch)
    return {
        name: retrieval_metrics(F.normalize(text) @ F.normalize(image).T, batch["pids"], batch["pids"])
        for name, (image, text) in embeddings.items()
    }


if __name__ == "__main__":
    main()
