"""A torch.profiler trace of a few training steps."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from utils.files import write_text
from utils.logger import LOGGER

SKIPPED = 3  # steps before the trace, which allocate memory and choose kernels
TRACE, TABLE = "trace.json", "trace.txt"
ROWS = 40  # operators in the table


class Profile:
    """Writes a trace of `steps` steps, and a table of their operators, into a run folder.

    Args:
        steps: number of steps; None writes nothing.
        run: run folder.
        device: device of the steps.
    """

    def __init__(self, steps: int | None, run: Path, device: torch.device) -> None:
        self.steps, self.run, self.device = steps, run, device
        self._done = 0
        self._running: profile | None = None

    def step(self) -> None:
        """Note the end of a step; starts and ends the trace."""
        if self.steps is None:
            return
        self._done += 1
        if self._done == SKIPPED:
            activities = [ProfilerActivity.CPU, *([] if self.device.type == "cpu" else [ProfilerActivity.CUDA])]
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()
        elif self._done == SKIPPED + self.steps:
            self.close()

    def close(self) -> None:
        """Write what was traced, also of a run that ends early."""
        if self._running is None:
            return
        self._running.stop()
        traced, self._running = self._running, None
        traced.export_chrome_trace(str(self.run / TRACE))
        kind = "cpu" if self.device.type == "cpu" else "device"
        write_text(self.run / TABLE, traced.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=ROWS))
        LOGGER.info(
            "profile of %d steps: %s (open it in https://ui.perfetto.dev), top operators in %s",
            *(self._done - SKIPPED, self.run / TRACE, self.run / TABLE),
        )
