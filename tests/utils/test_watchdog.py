"""Watchdog: stopped workers and processes are named, and the time-outs of data and processes end a run."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import utils.watchdog as watchdog
from datasets.loaders import eval_loader
from tests.helpers.processes import together
from utils.distributed import rank, start_processes
from utils.faults import machine_fault
from utils.watchdog import Watchdog, workers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Watchdog with short times; returns its warnings."""
    monkeypatch.setattr(watchdog, "PERIOD", 0.05)
    monkeypatch.setattr(watchdog, "PATIENCE", 1.0)
    said: list[str] = []
    monkeypatch.setattr(watchdog.LOGGER, "warning", lambda text, *values: said.append(text % values))
    return said


def wait_for(said: list[str], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_stopped_worker_is_named_once(quick: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with Watchdog():
            time.sleep(0.5)
            child.send_signal(signal.SIGSTOP)
            expected = f"stopped by a signal; kill -CONT {child.pid}"
            deadline = time.monotonic() + 20
            while not any(expected in line for line in quick) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.3)
        child.kill()
    assert len([line for line in quick if expected in line]) == 1


def _stopped(stopped: int, folder: Path) -> list[str]:
    watchdog.PERIOD, watchdog.PATIENCE = 0.1, 1.5
    said: list[str] = []
    watchdog.LOGGER.warning = lambda text, *values: said.append(text % values)  # type: ignore[method-assign]
    watchdog.print = lambda text, **options: said.append(text)  # type: ignore[attr-defined]
    pid = folder / "pid"
    with Watchdog():
        if rank() == stopped:
            pid.write_text(str(os.getpid()))
            time.sleep(4)
        else:
            while not pid.exists() or not pid.read_text():
                time.sleep(0.05)
            os.kill(int(pid.read_text()), signal.SIGSTOP)
            wait_for(said, 20)
            os.kill(int(pid.read_text()), signal.SIGCONT)
    return said


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_by_the_other(stopped: int, tmp_path: Path) -> None:
    """Process 0 holds the store as well, so that a stopped one does not answer at all."""
    said = together(2, _stopped, stopped, tmp_path)[1 - stopped]
    pid = (tmp_path / "pid").read_text()
    assert said and f"process {stopped} (PID {pid} on " in said[-1] and "no sign of life" in said[-1]


class Slow(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, int]:
        time.sleep(3)
        return {}


def test_a_batch_that_does_not_come_ends_with_the_workers_named() -> None:
    with pytest.raises(RuntimeError) as caught:
        next(iter(eval_loader(Slow(), 1, workers=1, timeout=1)))
    message = machine_fault(caught.value)
    assert message and message.startswith("no batch for data.timeout seconds (data loading worker (PID ")
    assert "data.workers=0" in message


def test_processes_that_do_not_come_end_the_start(monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layout = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in layout.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RuntimeError) as caught:
        start_processes(timeout=1)
    message = machine_fault(caught.value)
    assert message and message.startswith("another process did not answer for train.timeout seconds (")


def test_children_without_a_problem_are_listed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 20  # while it starts, it may wait for the disk
        while (f"data loading worker (PID {child.pid})", None) not in list(workers()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.kill()
