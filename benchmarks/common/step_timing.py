"""Comparison of the training step times of several tasks."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from configs.arguments import positive
from configs.schema import Config, load_config
from model.task import RetrievalTask
from processor.random_batch import random_batch
from utils.batch import Batch
from utils.distributed import default_device, describe_device
from utils.exit import exit_on_user_error


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
        tasks = {way: build(way, config).train() for way in ways}
        fields = frozenset().union(*(task.inputs for task in tasks.values()))
        vocab_size = tasks[ways[0]].encoder.vocab_size
        batch = random_batch(config, arguments.batch, vocab_size, fields, device=default_device())
        print(f"{describe_device(default_device())}, {arguments.batch} pairs, {arguments.steps} steps each, fp32")
        print(compare_steps(tasks, batch, arguments.steps))


def compare_steps(tasks: Mapping[str, RetrievalTask], batch: Batch, steps: int) -> str:
    """One line per task: median time of a step (forward and backward), and its ratio to the first task's.

    The tasks take turns, so that other load on the machine affects all of them. The first turn warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(steps + 1):
        for name, task in tasks.items():
            seconds[name].append(step_seconds(task, batch))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    first, width = next(iter(medians)), max(map(len, medians))
    lines = [f"{name:{width}} {time:8.3f} s   {time / medians[first]:.2f} x {first}" for name, time in medians.items()]
    return "\n".join(lines)


def step_seconds(task: RetrievalTask, batch: Batch) -> float:
    start = time.perf_counter()
    loss, _ = task(batch)
    loss.backward()
    loss.item()  # waits for the device
    return time.perf_counter() - start
