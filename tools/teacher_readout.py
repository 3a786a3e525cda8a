"""Rank one image and one caption of each person, plain and fused with support sets by a trained teacher.

Support sets are chosen by identity, so the numbers with support use test labels: a sanity check, not a result.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from configs.arguments import Parser
from datasets.annotations import load_annotations
from datasets.loaders import data_tokenizer
from datasets.pairs import TrainPairs
from datasets.presence import require_images
from datasets.transforms import build_transform
from model.build import build_task
from model.load import load_weights
from model.teacher import CachedTeacher, Teacher
from processor.evaluator import metrics_table
from processor.run_folder import run_config
from processor.teacher_cache import fill_cache
from utils.batch import to_device
from utils.distributed import default_device
from utils.errors import DataError
from utils.exit import exit_on_user_error
from utils.metrics import retrieval_metrics
from utils.paths import expand


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=expand, required=True, help="run folder; rows with support need a fusion")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"], help="default: train")
    parser.add_argument("--checkpoint", default="last", choices=["last", "best"], help="default: last")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config"
    )
    with exit_on_user_error():
        arguments = parser.parse_args()
        rows = read_out(arguments.run, arguments.split, arguments.checkpoint, arguments.set)
        print(metrics_table(rows, f"one view, {arguments.split}"))


def read_out(run: Path, split: str, checkpoint: str, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Metrics of the first image and caption of each person of a split, plain and (for a fusion) with support sets.

    Args:
        run: run folder of the teacher.
        split: train, val or test.
        checkpoint: best or last.
        overrides: overrides of the run's config.

    Raises:
        DataError: the split is empty.
    """
    config = run_config(run, overrides)
    task = build_task(config, weights=False)
    load_weights(task, run / f"{checkpoint}.pt", format="own")
    annotations = load_annotations(config.data.dataset, config.data.root, val_ids=config.carved_val_ids)
    records = annotations.train if split == "train" else annotations.split(split)
    if not records:
        raise DataError(f"{annotations.folder}: has no {split} split")
    require_images(annotations, [split], config.data)
    device = default_device()
    teacher = CachedTeacher(Teacher(task.encoder)).to(device)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=task.encoder.vocab_size, learn_from=annotations)
    labels = {pid: label for label, pid in enumerate(sorted({record.pid for record in records}))}
    transform = build_transform(config.data, train=False)
    pairs = TrainPairs(records, labels, transform, tokenizer, teacher.inputs, config.train.seed, config.data)
    fill_cache(teacher, pairs, config, device)

    firsts: dict[int, int] = {}  # pid -> first pair
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
