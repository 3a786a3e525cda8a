"""Time of training steps of several tasks, side by side."""

import statistics
import time
from collections.abc import Mapping

from model.task import RetrievalTask
from utils.batch import Batch


def compare_steps(tasks: Mapping[str, RetrievalTask], batch: Batch, steps: int) -> str:
    """A line for each task: the median time of its step (forward and backward), and its ratio to the first task's.

    The tasks take turns, so that whatever else the machine does is spread over all of them; the first turn warms up.
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
