"""Messages for faults of the machine: real ones of the operating system, and the words of libraries for others."""

import errno
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

from tests.helpers.configs import ROOT
from utils.faults import disk_fault, machine_fault, report_of_thread

MEMORY, HANDLES, THREADS = "out of memory", "too many open files", "no more threads"
SHARED, WORKER, DISK = "/dev/shm: too little shared memory", "a data loading worker died", "a file: "


def caught(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


def from_worker(error: Exception) -> Exception:
    """The error as torch raises it in the main process."""

    def fail() -> None:
        raise error

    try:
        fail()
    except Exception:
        wrapped = ExceptionWrapper(sys.exc_info(), "in DataLoader worker process 0")
    return caught(wrapped.reraise)


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"), MEMORY),
        (RuntimeError("std::bad_alloc"), MEMORY),
        (MemoryError(), MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY),
        (RuntimeError("unable to mmap 8 bytes from file </torch_1_2_3>: Cannot allocate memory (12)"), MEMORY),
        (RuntimeError("can't start new thread"), THREADS),
        (OSError(errno.EMFILE, "Too many open files", "a.jpg"), HANDLES),
        (RuntimeError("received 0 items of ancdata"), HANDLES),
        (
            RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files"),
            HANDLES,
        ),
        (Exception("Too many open files (os error 24)"), HANDLES),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), SHARED),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device"), SHARED),
        (Exception("No space left on device (os error 28)"), DISK + "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DISK + "Disk quota exceeded"),
    ],
    ids=str,
)
def test_the_words_of_libraries_are_understood_in_both_processes(error: Exception, said: str) -> None:
    assert str(machine_fault(error)).startswith(said)
    assert str(machine_fault(from_worker(error))).startswith(said)


@pytest.mark.parametrize(
    "text, said",
    [
        ("is killed by signal: Killed.", WORKER),
        ("is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory.", SHARED),
        ("exited unexpectedly", WORKER),
    ],
)
def test_a_worker_that_died_is_no_fault_of_a_disk(text: str, said: str) -> None:
    error = RuntimeError(f"DataLoader worker (pid 7) {text}")
    error.__context__ = OSError(errno.EACCES, "Permission denied", "another file")
    assert str(machine_fault(error)).startswith(said) and disk_fault(error) is None


def test_device_memory_and_disks_are_said_with_their_remedy() -> None:
    memory = machine_fault(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert memory and "Tried to allocate 2 GiB" in memory and "train.accumulate=4" in memory and "more" not in memory
    disk = machine_fault(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"))
    assert disk and disk.startswith("runs/a/metrics.jsonl: No space left on device")


@pytest.mark.parametrize("bug", [KeyError("x"), RuntimeError("shapes"), OSError(errno.ECHILD, "x"), RuntimeError("")])
def test_other_errors_are_left_alone(bug: Exception) -> None:
    assert machine_fault(bug) is None


def test_memory_that_the_machine_lacks() -> None:
    for allocate in (lambda: torch.empty(2**50), lambda: np.zeros(2**50), lambda: bytearray(2**50)):
        assert str(machine_fault(caught(allocate))).startswith(MEMORY)


def test_file_handles_that_the_machine_lacks() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[Any] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        error = caught(lambda: held.extend(open("/dev/null") for _ in range(999)))  # noqa: SIM115
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert str(machine_fault(error)).startswith(HANDLES)


@pytest.mark.parametrize("size", [1_000, 20_000, 39_000])
def test_a_full_disk_is_named_by_the_system_and_not_by_torch(size: int, tmp_path: Path, small_disk) -> None:
    def save() -> None:
        with open(tmp_path / "a.pt", "w+b") as file:
            torch.save({"a": torch.zeros(9999)}, file)

    small_disk(size)
    assert disk_fault(caught(save)) == "File too large"


def test_threads_report_faults_in_one_line_and_bugs_in_full(monkeypatch, capsys) -> None:
    monkeypatch.setattr(threading, "excepthook", report_of_thread)

    def run(error: Exception) -> str:
        def fail() -> None:
            raise error

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return capsys.readouterr().err

    assert run(MemoryError()).startswith("warning: out of memory")
    assert run(OSError(errno.ENOSPC, "No space left on device")) == ""  # the tracker reports it
    assert "Traceback" in run(KeyError("a bug"))


def test_errors_are_reported_without_torch() -> None:
    code = "import sys, utils.faults; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
