"""Clean exits: a message in place of a traceback for users' mistakes and faults of the machine."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator

import torch

from utils.distributed import world_size
from utils.errors import UserError

OTHERS_WAIT = 5  # seconds that other processes than the first wait before they print their error
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, a fault of the machine or Ctrl-C into a message on stderr and exit status 1 or 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else machine_fault(error)
        if message is None:
            raise
        # torchrun's variable: the process group may not exist yet. If all processes meet the same error, the first one
        # prints it, and torchrun ends the others.
        if number := int(os.environ.get("RANK", "0")):
            time.sleep(OTHERS_WAIT)
        print(f"error: {message}" if number == 0 else f"error (process {number}): {message}", file=sys.stderr)
        sys.exit(1)


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
            f"a data loading worker died, perhaps for lack of memory ({text}); resume from the last checkpoint with "
            "train.py --resume RUN, and with fewer workers: --set data.workers=1"
        )
    if isinstance(error, RuntimeError) and world_size() > 1 and ("closed by peer" in text or "reset by peer" in text):
        return "another process ended, see its message; resume from the last checkpoint with train.py --resume RUN"
    return None
