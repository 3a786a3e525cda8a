"""Whole training steps, and the comparison of several tasks' times."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.common.authors import AuthorsStep
from benchmarks.common.profiling import memory_mb
from benchmarks.common.rounds import Rounds, interleaved
from configs.arguments import positive
from configs.schema import Config, load_config
from model.build import as_configured, build_task, distils, random_teacher
from model.task import RetrievalTask
from model.teacher import CachedTeacher
from processor.gradient_cache import backward
from processor.random_batch import NUM_PAIRS, micro_batches_of, random_batch, rows_per_pair
from solver.optimizer import build_optimizer, set_lr
from utils.batch import Batch
from utils.distributed import default_device, describe_device, peak_memory
from utils.exit import exit_on_user_error
from utils.precision import matmul_precision

NUM_PIDS = 11_003  # of CUHK-PEDES


class TrainingStep:
    """Forward pass, losses, backward pass and update of a task, as in training."""

    def __init__(self, task: RetrievalTask, config: Config) -> None:
        self.task, self.config = task.to(default_device()).train(), config
        self.optimizer = build_optimizer(config.solver, task.named_parameters())
        set_lr(self.optimizer, lambda base_lr: base_lr)

    def __call__(self, batch: Batch) -> float:
        """Train on a batch of `random_batch`; returns the loss."""
        config = self.config.train
        with matmul_precision(config.matmul):
            loss, _ = backward(
                self.task,
                micro_batches_of(batch, config.accumulate, rows_per_pair(self.config)),
                device=default_device(),
                precision=config.precision,
                scale=lambda loss: loss,
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device


def step_of(config: Config) -> TrainingStep:
    """The step of a config, with random weights of encoder and teacher."""
    task = build_task(config, NUM_PIDS, weights=False, teacher=False)
    teacher = as_configured(random_teacher(config), config) if distils(config) else None
    if isinstance(teacher, CachedTeacher):
        teacher.fill(*(torch.randn(NUM_PAIRS, task.encoder.embed_dim) for _ in range(2)))
    return TrainingStep(RetrievalTask(task.encoder, dict(task.named_objectives()), teacher), config)


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
    before = memory_mb("VmRSS")
    torch.manual_seed(0)
    with torch.device("meta"):  # takes no memory
        task = build_task(config, NUM_PIDS, weights=False, teacher=False)
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
