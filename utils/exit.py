"""Clean exits: a message in place of a traceback for users' mistakes and faults of the machine."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from utils.console import open_console
from utils.distributed import env_rank
from utils.errors import ConfigError, UserError
from utils.faults import behind, machine_fault, report_of_thread
from utils.paths import expanded
from utils.yaml_text import encodable

OTHERS_WAIT = 5  # seconds that other processes than the first wait before they print their error


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, a fault of the machine, Ctrl-C or SIGTERM into a message and exit status 1, 130 or 143.

    Notes of the exception follow the message, so that they are the last lines on the screen.
    """
    open_console()
    threading.excepthook = report_of_thread
    end_on_sigterm()
    try:
        check_arguments()
        try:
            yield
        except SystemExit:  # argparse has printed its help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (KeyboardInterrupt, Terminated) as error:
        print("\n".join([str(error) or "interrupted", *notes(error)]), file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)
    except Exception as error:
        message = _of_user(error) if isinstance(error, UserError) else machine_fault(error)
        if message is None:
            raise
        # If all processes meet the same error, the first one prints it, and torchrun ends the others.
        if number := env_rank():
            time.sleep(OTHERS_WAIT)
        prefix = "error" if number == 0 else f"error (process {number})"
        print("\n".join([f"{prefix}: {message}", *notes(error)]), file=sys.stderr)
        sys.exit(1)


def _of_user(error: UserError) -> str:
    """The error's message; after the shortage that made a good file look bad, if there was one."""
    found = behind(error)
    return str(error) if found is None else f"{found}\n{error}"


def check_arguments() -> None:
    """Raise `ConfigError` for a command line that UTF-8 cannot encode: no config or log could hold it."""
    for argument in sys.argv[1:]:
        if not encodable(text := expanded(argument)):
            raise ConfigError(f"command line: must be UTF-8, got {text!r}; rename the file or folder")


class Terminated(BaseException):
    """SIGTERM, as cluster schedulers send it before they kill."""


def end_on_sigterm() -> None:
    """Raise `Terminated` on SIGTERM, until `start_processes` finds that this process has others to wait for."""
    program = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != program:  # a forked data loading worker
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated("terminated (SIGTERM)")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def notes(error: BaseException) -> list[str]:
    """Notes that `add_note` has put on an exception."""
    return list(getattr(error, "__notes__", []))
