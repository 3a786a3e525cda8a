"""Whole training steps, and the comparison of several tasks' times."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.common.authors import NUM_PIDS, AuthorsStep
from benchmarks.common.profiling import memory_mb
from benchmarks.common.rounds import Rounds, interleaved
from configs.arguments import positive
from configs.schema import Config, load_config
from model.build import build_task, random_task
from model.task import RetrievalTask
from model.teacher import CachedTeacher
from processor.engine import Engine
from processor.random_batch import NUM_PAIRS, micro_batches_of, random_batch, rows_per_pair
from solver.optimizer import set_lr
from utils.batch import Batch
from utils.distributed import default_device, describe_device, peak_memory
from utils.exit import exit_on_user_error

CHECKPOINTING = ("model.image.checkpointing=true", "model.text.checkpointing=true")


class TrainingStep:
    """Forward pass, losses, backward pass and update of a task, as in training."""

    def __init__(self, task: RetrievalTask, config: Config) -> None:
        self.task, self.config = task.train(), config
        self.engine = Engine(task, config, default_device())
        set_lr(self.engine.optimizer, lambda base_lr: base_lr)

    def __call__(self, batch: Batch) -> float:
        """Train on a batch of `random_batch`; returns the loss."""
        loss, _ = self.engine.backward(
            micro_batches_of(batch, self.config.train.accumulate, rows_per_pair(self.config))
        )
        self.engine.update()
        return loss.item()  # waits for the device


def step_of(config: Config) -> TrainingStep:
    """The step of a config, with random weights of encoder and teacher."""
    task = random_task(config, NUM_PIDS)
    if isinstance(task.teacher, CachedTeacher):
        task.teacher.fill(*(torch.randn(NUM_PAIRS, task.encoder.embed_dim) for _ in range(2)))
    return TrainingStep(task, config)


def cost_of_steps(
    config: Config, pairs: int, steps: int, authors: tuple[str, str] | None = None
) -> tuple[float, float, float]:
    """Cost of training steps in this process, which must be fresh.

    Args:
        config: resolved config.
        pairs: pairs in a step.
        steps: timed steps.
        authors: method and folder of the authors' code, to measure in place of ours.

    Returns:
        Seconds of a step, the median behind the first one. Peak MB: of the GPU, or of the process above its level
        before the model. Loss of the first step.
    """
    with torch.device("meta"):  # takes no memory, and imports what a task needs
        task = build_task(config, NUM_PIDS, weights=False, teacher=False)
    before = memory_mb("VmRSS")
    torch.manual_seed(0)
    step = step_of(config) if authors is None else AuthorsStep(*authors, config)
    fields = task.inputs | {"caption_ids"}
    batch = random_batch(config, pairs, task.encoder.vocab_size, fields, device=default_device())
    seconds, losses = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    on_cpu = default_device().type == "cpu"
    peak = memory_mb("VmHWM") - before if on_cpu else 1024 * (peak_memory(default_device()) or 0)
    return statistics.median(seconds[1:]), peak, losses[0]


def steps_program(
    description: str | None, default: str, ways: Sequence[str], build: Callable[[str, Config], RetrievalTask]
) -> None:
    """Command line of a program that compares the steps of several tasks.

    Args:
        description: description of the program.
        default: path of the default config.
        ways: names of the tasks; ratios are relative to the first.
        build: name and config -> task.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=default, help=f"default: {default}")
    parser.add_argument("--batch", type=positive, default=8, help="pairs in a step; default: 8")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of each task, in turns; default: 5")
    with exit_on_user_error():
        arguments = parser.parse_args()
        config = load_config(arguments.config)
        tasks = {way: build(way, config) for way in ways}
        fields = frozenset().union(*(task.inputs for task in tasks.values()))
        batch = random_batch(
            config, arguments.batch, tasks[ways[0]].encoder.vocab_size, fields, device=default_device()
        )
        steps = {way: partial(TrainingStep(task, config), batch) for way, task in tasks.items()}
        rounds = interleaved(steps, arguments.steps)
        what = f"{arguments.config}, {arguments.batch} pairs, {config.train.precision}"
        print(f"{describe_device(default_device())}, {what}")
        print(f"\n{table(rounds, ways)}\n\n{rounds.note}")


def table(rounds: Rounds, ways: Sequence[str]) -> str:
    """Markdown table with the seconds of each way, and its ratio to the first."""
    lines = [f"| step | seconds | range | x {ways[0]} |", "|---|---:|---:|---:|"]
    lines += [f"| {way} | {rounds.cells(way)} | {rounds.ratio(way, ways[0]):.2f} |" for way in ways]
    return "\n".join(lines)
