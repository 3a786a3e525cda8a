"""Kills and damaged files: `python -m benchmarks.robustness --kills 100 --damaged 1000`.

Trains a tiny run that is killed with SIGKILL at random moments and resumed, over and over, and compares each finished
run with an uninterrupted one. Then damages checkpoints at random places, and counts those that are used nevertheless.
"""

import argparse
import copy
import functools
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common.damage import cut, flip_bit, move_block, zero_block
from configs.schema import Config, load_config
from datasets.synthetic.render import render_dataset
from model.checkpoints.files import read_weights
from processor import training
from processor.resolve import resolve
from processor.saving import in_precision
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError
from utils.exit import exit_on_user_error
from utils.integrity import file_hash

SMALL = [
    *("data.image_size=[64, 32]", "data.text_length=48", "data.batch_size=32", "data.workers=1"),
    "model.image.options={embed_dim: 64, depth: 1, num_heads: 1, patch_size: 16, weight_init: jax}",
    "model.text.options={vocab_size: 1024, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 1}",
    *("train.epochs=2", "train.save_every_steps=1", "train.log_every=5"),
]
DAMAGES = (flip_bit, zero_block, cut, move_block)


def config_of(folder: Path) -> Config:
    return resolve(load_config("configs/synthetic.yaml", [*SMALL, f"data.root={folder / 'data'}"]))


def kills(folder: Path, number: int, draw: random.Random) -> Counter[str]:
    """Kill runs at random moments until there were `number` kills; returns counts of kills and of equal runs."""
    counts: Counter[str] = Counter()
    render_dataset(folder / "data", train_ids=80, val_ids=20, test_ids=20)
    straight, started = folder / "straight", time.monotonic()
    in_child(functools.partial(start_or_resume, folder, straight), None)
    longest = 1.2 * (time.monotonic() - started)
    while counts["kills"] < number:
        run = folder / f"run{counts['runs']}"
        while not in_child(
            functools.partial(start_or_resume, folder, run),
            draw.uniform(0, longest) if counts["kills"] < number else None,
        ):
            counts["kills"] += 1
        counts["runs"] += 1
        counts["equal runs"] += equal_runs(straight, run)
    return counts


def start_or_resume(folder: Path, run: Path) -> None:
    if run.exists():
        training.resume(run, [])
    else:
        training.train(config_of(folder), run)


def in_child(run: Callable[[], Any], seconds: float | None) -> bool:
    """Call a function in a forked process, and kill it after some seconds; returns True if it ended by itself."""
    if (pid := os.fork()) == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        torch.set_num_threads(1)
        os.setpgid(0, 0)
        run()
        os._exit(0)
    deadline = time.monotonic() + (seconds or 10**6)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"a run ended with status {status}, see above")
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def equal_runs(one: Path, two: Path) -> bool:
    """True if the checkpoints of two runs hold the same weights and optimizer state, bit for bit."""
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(run / name) for run in (one, two))
        if a["epoch"] != b["epoch"] or not equal(a["model"], b["model"]):
            return False
        if name == "last.pt" and not equal(a["training"]["optimizer"], b["training"]["optimizer"]):
            return False
    return True


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


def damaged(folder: Path, number: int, draw: random.Random) -> Iterator[tuple[str, Counter[str]]]:
    """Kind of file, and counts of the outcomes of its damaged copies."""
    content = load_checkpoint(folder / "straight/last.pt")
    weights = content["model"]
    writers: dict[str, Callable[[Path], Any]] = {
        "last.pt": lambda path: save_checkpoint(path, content),
        "best.pt in bf16": lambda path: save_checkpoint(path, {"model": in_precision(weights, "bf16"), "epoch": 1}),
        "torch.save": lambda path: torch.save({"model": weights}, path),
        "legacy torch.save, .sha256": lambda path: torch.save(
            {"model": weights}, path, _use_new_zipfile_serialization=False
        ),
        "safetensors, .sha256": lambda path: save_file(weights, path),
    }
    for name, write in writers.items():
        path = folder / ("damaged.safetensors" if name.startswith("safetensors") else "damaged.pt")
        path.unlink(missing_ok=True)
        write(path)
        sidecar = path.with_name(f"{path.name}.sha256")
        sidecar.unlink(missing_ok=True)
        if name.endswith(".sha256"):
            sidecar.write_text(f"{file_hash(path)}  {path.name}\n")
        intact, outcomes = path.read_bytes(), Counter[str]()
        expected = copy.deepcopy(read_weights(path))  # safetensors maps the file
        for count in range(number // len(writers)):
            data = bytearray(intact)
            DAMAGES[count % len(DAMAGES)](data, draw)
            path.write_bytes(data)
            if data == intact:
                outcomes["unchanged"] += 1
                continue
            try:
                outcomes["same weights" if equal(read_weights(path), expected) else "OTHER WEIGHTS"] += 1
            except CheckpointError:
                outcomes["refused"] += 1
        yield name, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damaged", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    with exit_on_user_error():
        arguments = parser.parse_args()
        draw = random.Random(arguments.seed)
        with tempfile.TemporaryDirectory() as folder:
            counts = kills(Path(folder), arguments.kills, draw)
            print(
                f"{counts['kills']} kills: {counts['equal runs']} of {counts['runs']} finished runs are equal",
                flush=True,
            )
            for name, outcomes in damaged(Path(folder), arguments.damaged, draw):
                print(f"{name}: {', '.join(f'{count} {what}' for what, count in sorted(outcomes.items()))}", flush=True)


if __name__ == "__main__":
    main()
