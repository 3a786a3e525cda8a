"""processor/timing.py: where the time of steps goes, in log lines and records."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from configs.schema import TrainConfig
from processor import timing as timing_module
from processor import training
from processor.timing import PARTS, Stopwatch, Timing
from tests.helpers.configs import config_of
from tests.helpers.runs import lines_of

CPU = torch.device("cpu")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing_module, "time", found)
    return found


def run_steps(timing: Timing, clock: Clock, times: list[tuple[float, float, float]], pairs: int = 8) -> None:
    """Steps that take so long for data, forward and backward pass, and optimizer."""

    def batches():
        for data, _, _ in times:
            clock.now += data
            yield None

    for number, _ in enumerate(timing.steps(batches())):
        clock.now += times[number][1]
        timing.computed()
        clock.now += times[number][2]
        timing.updated(pairs)


def test_a_line_says_speed_parts_and_ends(clock: Clock) -> None:
    timing = Timing(TrainConfig(epochs=3), CPU)
    timing.start(1, 0, 20)
    run_steps(timing, clock, [(0.5, 1.0, 0.5)] * 10)
    assert timing.line() == (
        "4.0 samples/s, 2000 ms a step (data 25%, forward + backward 50%, optimizer 25%), "
        "epoch ends in 0:00:20, run in 0:01:40"
    )
    run_steps(timing, clock, [(0, 1.0, 0)] * 5)  # the line is about the steps since the last one
    assert timing.line().startswith("8.0 samples/s, 1000 ms a step (data 0%, forward + backward 100%, optimizer 0%)")


def test_evaluations_and_checkpoints_count_for_the_end_of_the_run(clock: Clock) -> None:
    timing = Timing(TrainConfig(epochs=3), CPU)
    with timing.beside("evaluation"):
        clock.now += 60
    with timing.beside("checkpoints"):
        clock.now += 10
    assert timing.beside_steps() == {"evaluation_seconds": 60, "checkpoints_seconds": 10}
    assert timing.beside_steps() == {"evaluation_seconds": 0, "checkpoints_seconds": 0}
    timing._per_epoch = 70  # as after these
    timing.start(2, 0, 10)
    run_steps(timing, clock, [(0, 1, 0)] * 5)
    assert timing.line().endswith("epoch ends in 0:00:05, run in 0:01:25")


def test_the_record_has_the_parts_of_a_step_and_mfu(clock: Clock) -> None:
    timing = Timing(TrainConfig(), CPU)
    assert timing.peak is None  # of a CPU
    timing.flops, timing.peak = 30, 100.0
    timing.start(1, 0, 4)
    run_steps(timing, clock, [(0.25, 0.5, 0.25)] * 4)
    assert ", MFU 30%, " in timing.line()
    record = timing.record()
    assert [record[f"{part}_ms"] for part in PARTS] == [250, 500, 250, 0]
    assert record["mfu"] == pytest.approx(0.3) and record["samples_per_second"] == 8
    timing.flops = None
    assert "mfu" not in timing.record()


@pytest.mark.parametrize("waits, warned", [([5.0] * 10 + [0.1] * 40, False), ([0.0] * 10 + [0.9] * 40, True)])
def test_a_slow_loader_is_said_once_and_not_for_its_start(
    waits: list[float], warned: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(timing_module.LOGGER, "warning", lambda *words: said.append(words[0] % words[1:]))
    timing = Timing(TrainConfig(), CPU)
    for epoch in (1, 2):
        timing.start(epoch, 0, 50)
        run_steps(timing, clock, [(wait, 1.0, 0.0) for wait in waits])
        timing.record()
    assert len(said) == warned
    assert not warned or said[0].startswith("the steps waited for data for 47 % of their time; set data.cache=on, ")


class Event:
    """An event of a GPU, whose time is known only after waiting for it."""

    queue: ClassVar[list["Event"]] = []
    now, waits = 0.0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = False

    def record(self) -> None:
        self.at = Event.now
        Event.queue.append(self)

    def synchronize(self) -> None:
        Event.waits += 1
        for event in Event.queue:
            event.done = True

    def elapsed_time(self, end: "Event") -> float:
        assert self.done and end.done
        return 1000 * (end.at - self.at)


def test_on_a_gpu_times_are_read_at_log_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(5):
        for part, seconds in (("data", 0.25), ("forward_backward", 2), ("optimizer", 1)):
            Event.now += seconds
            watch.mark(part)
    assert Event.waits == 0
    assert {part: sum(laps) for part, laps in watch.read().items()} == {
        "data": 1.25,
        "forward_backward": 10,
        "optimizer": 5,
        "other": 0,
    }
    assert Event.waits == 1


def test_a_run_says_where_its_time_goes(root: Path, tmp_path: Path) -> None:
    run = training.train(config_of("baseline", root, "train.log_every=2"), tmp_path / "run")
    (record,) = lines_of(run)
    parts = [record[f"{part}_ms"] for part in PARTS]
    assert min(parts[:3]) > 0 and record["evaluation_seconds"] > 0 and record["checkpoints_seconds"] > 0
    assert 4 * sum(parts) == pytest.approx(1000 * record["seconds"], rel=0.2)
    lines = re.findall(r"samples/s, \d+ ms a step \(data \d+%.*epoch ends in \d:.*", (run / "train.log").read_text())
    assert len(lines) == 2
