"""Time and peak memory of a call; Linux, CPU."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from utils.errors import TrainingError

# glibc's allocator with one arena that returns large blocks at once: the peak is that of tensors and not of caches.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module's function in a new process, because peak memory is counted per process.

    Raises:
        TrainingError: the process was killed, for instance because memory was full.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise TrainingError("the measured process was killed, perhaps for memory; measure a smaller size") from None


def measured(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, peak MB in addition to memory held before, and the result."""
    before, start = memory_mb("VmRSS"), time.perf_counter()
    result = function()
    return time.perf_counter() - start, memory_mb("VmHWM") - before, result


def memory_mb(field: str) -> float:
    """A field of /proc/self/status, such as VmRSS (resident) or VmHWM (its peak)."""
    # Not getrusage: its peak survives exec, so a child of a large process would report its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
