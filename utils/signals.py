"""Ctrl-C, SIGTERM and SIGUSR1: a program ends in one line, and training ends after the step that it is in."""

import atexit
import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NoReturn

# SLURM and other schedulers send SIGTERM before they kill, or the signal of `--signal`. Windows lacks SIGUSR1.
ENDING = {
    number: f"{'interrupted' if name == 'SIGINT' else 'terminated'} ({name})"
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if (number := getattr(signal, name, None)) is not None
}
STOPPING = [number for number in ENDING if number != signal.SIGINT]
Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """A signal that ends the program.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(ENDING[number])
        self.status = 128 + number  # exit status by the convention of shells


def end_at_once() -> None:
    """End in one line on each signal, wherever the program is: nothing is lost while it imports or ends."""
    _handle(dict.fromkeys(ENDING, _end))


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Raise `Interrupted` on a signal. A second one ends the program at once."""
    with _handled(dict.fromkeys(ENDING, _raise)):
        yield


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import libraries in the body. A signal ends the program at once, because libraries catch exceptions.

    Garbage collection is off, which takes a fifth of the time and finds nothing. Later it skips the libraries.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with _handled(dict.fromkeys(ENDING, _end)):
            yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)
        if collects:
            gc.enable()


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Keeps SIGTERM or SIGUSR1 in `number` during the body, which is to end when it can."""

    def __init__(self) -> None:
        self.number = 0  # no signal
        self._handled = _handled(dict.fromkeys(STOPPING, self._note))

    def __enter__(self) -> "StopRequest":
        self._handled.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._handled.__exit__(None, None, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


def leave_signals_to_main() -> None:
    """Let only the parent end a data loading worker, since schedulers send signals to all processes of a job."""
    _handle({number: signal.SIG_IGN for number in ENDING if number != signal.SIGTERM})
    if hasattr(signal, "sigwaitinfo"):  # macOS and Windows lack it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{ENDING[number]}\n".encode())
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    end_at_once()
    raise Interrupted(number)


def _handle(handlers: Mapping[int, Handler | signal.Handlers]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _handled(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Set handlers during the body, in this process and not in those that it forks; other threads set none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    program = os.getpid()

    def in_program(handler: Handler) -> Handler:
        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() == program:  # a forked worker is ended by its parent
                handler(number, frame)

        return handle

    before = {number: signal.getsignal(number) for number in handlers}
    _handle({number: in_program(handler) for number, handler in handlers.items()})
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
