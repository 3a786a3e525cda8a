"""Watchdog: a thread that names data loading workers and processes of a run that have stopped."""

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from utils.distributed import gather_objects, rank, world_size
from utils.logger import LOGGER

PERIOD = 5.0  # seconds between looks
PATIENCE = 60.0  # seconds without a sign of life before it is said
ENDED = 2**40  # added to the count of a process that has ended in good order
SILENT = "stopped, or its machine is unreachable"
STATES = {"T": "stopped by a signal; kill -CONT {pid} continues it", "D": "waiting for a disk or network file system"}


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Logs a warning about each worker or process that shows no sign of life for `PATIENCE` seconds.

    A worker shows none while the operating system lists it as stopped or waiting for a disk. A process shows one with
    each count of its own thread; the first process watches the others, and the second one watches the first.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._alive: dict[str, float] = {}  # who -> time of the last sign of life
        self._said: set[str] = set()
        self._names = [""]
        self._processes: dict[str, str | None] = {}  # watched process -> its problem
        self._answered = time.monotonic()  # time of the last answer of the store
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._count)]

    def __enter__(self) -> "Watchdog":
        self._names = gather_objects(f"process {rank()} (PID {os.getpid()} on {socket.gethostname()})")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            problems = dict(workers()) | self._processes
            if world_size() > 1 and time.monotonic() - self._answered > 3 * PERIOD:
                problems[self._names[0]] = SILENT  # the store lives in the first process, or beside it
            self._look(problems)

    def _count(self) -> None:
        """Count in the store as a sign of life, and read the counts of others. A stopped store never answers."""
        watched = range(1, world_size()) if rank() == 0 else [0] if rank() == 1 else []
        if world_size() == 1 or (store := _connect()) is None:
            self._answered = math.inf  # nobody to listen to
            return
        before: dict[int, int] = {}
        with contextlib.suppress(RuntimeError):  # the store has ended
            while not self._ended.wait(PERIOD):
                store.add(_key(rank()), 1)
                counts = {number: store.add(_key(number), 0) for number in watched}
                self._processes = {
                    self._names[number]: SILENT if count < ENDED and count == before.get(number) else None
                    for number, count in counts.items()
                }
                before, self._answered = counts, time.monotonic()
            store.add(_key(rank()), ENDED)

    def _look(self, problems: dict[str, str | None]) -> None:
        """Say which workers and processes have had their problem for too long.

        Args:
            problems: worker or process -> its problem, or None after a sign of life.
        """
        now = time.monotonic()
        for who, problem in problems.items():
            since = self._alive.setdefault(who, now)
            if problem is None:
                self._alive[who] = now
                self._said.discard(who)
            elif now - since >= PATIENCE and who not in self._said:
                self._said.add(who)
                text = f"{who}: no sign of life for {now - since:.0f} s: {problem}"
                LOGGER.warning("%s", text) if rank() == 0 else print(f"warning: {text}", file=sys.stderr, flush=True)


def _key(number: int) -> str:
    return f"watchdog/{number}"


def _connect() -> Store | None:
    """A connection of the watchdog to the store of the process group, apart from the one that trains."""
    try:
        return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (KeyError, RuntimeError):
        return None


def workers() -> Iterator[tuple[str, str | None]]:
    """(name, problem) of each child process, such as data loading workers; the problem is None for a healthy one.

    Linux lists them. `multiprocessing.active_children` would collect those that have ended, which is up to their owner.
    """
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            for pid in children.read_text().split():
                with contextlib.suppress(OSError, IndexError):  # the process has
                    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    problem = STATES[state].format(pid=pid) if state in STATES else None
                    yield f"data loading worker (PID {pid})", problem
