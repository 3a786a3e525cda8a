"""Time and peak memory of a call, time of training steps, for the benchmarks; Linux, CPU."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.task import RetrievalTask
from utils.batch import Batch


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a module's function where nothing has been allocated yet: peaks are per process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measured(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, peak MB above what was held before, and the result."""
    before, start = _memory_mb("VmRSS"), time.perf_counter()
    result = function()
    return time.perf_counter() - start, _memory_mb("VmHWM") - before, result


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


def _memory_mb(field: str) -> float:
    # Not getrusage: its peak survives exec, so a child of a large process would hide what it allocates itself.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
