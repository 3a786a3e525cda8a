"""Times of the parts of a training step: waiting for data, forward and backward pass, optimizer."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch

from configs.schema import TrainConfig
from utils.distributed import device_name, peak_memory, world_size
from utils.logger import LOGGER
from utils.peaks import peak_flops

T = TypeVar("T")
Mark: TypeAlias = float | torch.cuda.Event

DATA, COMPUTE, OPTIMIZER, OTHER = "data", "forward_backward", "optimizer", "other"
PARTS = (DATA, COMPUTE, OPTIMIZER, OTHER)
BESIDE = ("evaluation", "checkpoints")
WARM_UP = 10  # steps that judgements leave out
SLOW = 0.25  # fraction of the time of steps spent on waiting for data that deserves a warning


class Stopwatch:
    """Seconds between marks, without waiting for a GPU: marks are events in its queue, read at log lines only.

    Args:
        device: device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, list[float]] = {part: [] for part in PARTS}
        self._marks: list[tuple[str, Mark]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """End a part: it lasted from the mark before until now."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, list[float]]:
        """Part -> its seconds, lap by lap. Waits for the device."""
        last = self._marks[-1][1]
        if not isinstance(last, float):
            last.synchronize()
        for (_, start), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            self.laps[part].append(_seconds(start, end))
        self._marks = self._marks[-1:]
        return self.laps

    def _now(self) -> Mark:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return float(start.elapsed_time(end)) / 1000


class Timing:
    """The times of a run, for its log lines and records.

    Args:
        config: settings of the training loop.
        device: device of the steps.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.device, self.epochs = device, config.epochs
        self.flops: int | None = None  # of a step of this process, once they are counted
        self.peak = peak_flops(device_name(device), config.precision, config.matmul)
        self.warned = False
        self._beside, self._per_epoch = dict.fromkeys(BESIDE, 0.0), 0.0
        self.start(1, 0, 1)

    def start(self, epoch: int, done: int, total: int) -> None:
        """Begin an epoch.

        Args:
            epoch: its number.
            done: its steps that an interrupted run has done.
            total: all of its steps.
        """
        self.epoch, self.first, self.total = epoch, done + 1, total
        self.watch, self.pairs, self._logged = Stopwatch(self.device), [0], 0
        self._started = time.perf_counter()

    def steps(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that each one is waited for."""
        iterator = iter(batches)
        while True:
            self.watch.mark(OTHER)  # logs and checkpoints
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.watch.mark(DATA)
            yield batch

    def computed(self) -> None:
        """Note the end of the backward pass."""
        self.watch.mark(COMPUTE)

    def updated(self, pairs: int) -> None:
        """Note the end of a step on this number of pairs."""
        self.watch.mark(OPTIMIZER)
        self.pairs.append(self.pairs[-1] + pairs)

    @contextlib.contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Time work between the steps, one of `BESIDE`."""
        start = time.perf_counter()
        yield
        self._beside[what] += time.perf_counter() - start

    def line(self) -> str:
        """Speed of the steps since the last line, where their time went, and when the epoch and the run will end."""
        since, self._logged = self._logged, len(self.pairs) - 1
        steps, seconds = self._logged - since, self._sums(since)
        total = max(sum(seconds.values()), 1e-9)
        speed = (self.pairs[-1] - self.pairs[since]) / total
        parts = ", ".join(
            f"{part.replace('_', ' + ')} {seconds[part] / total:.0%}" for part in (DATA, COMPUTE, OPTIMIZER)
        )
        mfu = "" if (rate := self._mfu(steps / total)) is None else f", MFU {rate:.0%}"
        left = (self.total - self.first + 1 - self._logged) * total / steps
        rest = left + (self.epochs - self.epoch) * (self.total * total / steps + self._per_epoch)
        ends = f"epoch ends in {_shown(left)}, run in {_shown(rest)}"
        return f"{speed:.1f} samples/s, {1000 * total / steps:.0f} ms a step ({parts}){mfu}, {ends}"

    def record(self) -> dict[str, Any]:
        """The times of an epoch's steps under their names in metrics.jsonl; logs them, and warns of a slow loader."""
        seconds, steps, parts = time.perf_counter() - self._started, len(self.pairs) - 1, self._sums(0)
        record: dict[str, Any] = {"seconds": seconds, "samples_per_second": self.pairs[-1] / seconds}
        record |= {f"{part}_ms": 1000 * parts[part] / max(steps, 1) for part in PARTS}
        if (rate := self._mfu(steps / max(sum(parts.values()), 1e-9))) is not None:
            record["mfu"] = rate
        if (memory := peak_memory(self.device)) is not None:
            record["peak_memory_gib"] = memory
        LOGGER.info(
            "Epoch %d done. Time per batch: %.3f[s] Speed: %.1f[samples/s]%s",
            *(self.epoch, seconds / max(steps, 1), record["samples_per_second"]),
            "" if memory is None else f" Peak memory: {memory:.2f}[GiB]",
        )
        self._warn()
        return record

    def beside_steps(self) -> dict[str, float]:
        """Seconds of the work between the steps since the last call, for a record."""
        found, self._beside = self._beside, dict.fromkeys(BESIDE, 0.0)
        self._per_epoch = sum(found.values())
        return {f"{what}_seconds": seconds for what, seconds in found.items()}

    def _sums(self, since: int) -> dict[str, float]:
        """Part -> seconds from step `since` on; logs and checkpoints count for the step before them."""
        return {part: sum(laps[since:]) for part, laps in self.watch.read().items()}

    def _mfu(self, steps_per_second: float) -> float | None:
        """Fraction of the device's peak that the counted operations are."""
        if self.flops is None or self.peak is None:
            return None
        return self.flops * steps_per_second / self.peak

    def _warn(self) -> None:
        parts = self._sums(WARM_UP)
        waiting, total = parts[DATA], sum(parts[part] for part in (DATA, COMPUTE, OPTIMIZER))
        if self.warned or waiting <= SLOW * total:
            return
        self.warned = True
        LOGGER.warning(
            "the steps waited for data for %.0f %% of their time; set data.cache=on, raise data.workers, put the "
            "images on a faster disk, or train on a machine with more cores%s",
            100 * waiting / total,
            " per process" if world_size() > 1 else "",
        )


def _shown(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
