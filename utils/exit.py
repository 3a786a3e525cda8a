"""Clean exits: a message in place of a traceback for users' mistakes and faults of the machine."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch

from utils.console import open_console
from utils.distributed import env_rank
from utils.errors import ConfigError, UserError
from utils.launcher import number_in
from utils.paths import expanded
from utils.watchdog import workers
from utils.yaml_text import encodable

OTHERS_WAIT = 5  # seconds that other processes than the first wait before they print their error
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, a fault of the machine, Ctrl-C or SIGTERM into a message and exit status 1, 130 or 143.

    Notes of the exception follow the message, so that they are the last lines on the screen.
    """
    open_console()
    end_on_sigterm()
    try:
        check_arguments()
        yield
        sys.stdout.flush()
    except (KeyboardInterrupt, Terminated) as error:
        print("\n".join([str(error) or "interrupted", *notes(error)]), file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else machine_fault(error)
        if message is None:
            raise
        # If all processes meet the same error, the first one prints it, and torchrun ends the others.
        if number := env_rank():
            time.sleep(OTHERS_WAIT)
        prefix = "error" if number == 0 else f"error (process {number})"
        print("\n".join([f"{prefix}: {message}", *notes(error)]), file=sys.stderr)
        sys.exit(1)


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


def machine_fault(error: Exception) -> str | None:
    """Message for full memory, a full disk or a killed process; None for other errors."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of device memory ({text}); set train.accumulate=4 or model.image.checkpointing=true, which train the "
            "same with less memory, or lower data.batch_size or eval.batch_size"
        )
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return f"{error.filename or 'a file'}: {error.strerror}; earlier checkpoints are intact"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return (
            f"a data loading worker died, perhaps for lack of memory ({text}); use fewer workers, for instance "
            "--set data.workers=1"
        )
    if isinstance(error, RuntimeError) and text.startswith("DataLoader timed out"):
        states = "; ".join(f"{who}: {problem or 'at work'}" for who, problem in workers())
        return (
            f"no batch for data.timeout seconds ({states}); look for a slow or dead disk, raise data.timeout, or set "
            "data.workers=0 to see the file that hangs"
        )
    several = number_in(os.environ, "WORLD_SIZE") > 1  # known before the processes have met
    if isinstance(error, RuntimeError) and several and ("Timed out" in text or "timed out" in text):
        return f"another process did not answer for train.timeout seconds ({text}); see the warnings above"
    if isinstance(error, RuntimeError) and several and ("closed by peer" in text or "reset by peer" in text):
        return "another process ended, see its message; resume from the last checkpoint with train.py --resume RUN"
    return None
