"""What ends a program in one piece: errors that are the user's to mend, and faults of the machine."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator

import torch

from utils.distributed import world_size
from utils.errors import UserError

OTHERS_WAIT = 5  # seconds until another process than the first says what went wrong
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
        message = str(error) if isinstance(error, UserError) else fault_of_the_machine(error)
        if message is None:
            raise
        # Of torchrun, which the processes may not have joined yet. The first one says what all of them meet, and
        # torchrun then ends the others.
        if number := int(os.environ.get("RANK", "0")):
            time.sleep(OTHERS_WAIT)
        print(f"error: {message}" if number == 0 else f"error (process {number}): {message}", file=sys.stderr)
        sys.exit(1)


def fault_of_the_machine(error: Exception) -> str | None:
    """What to say of memory or a disk that is full, or of a process that was killed; None: it is none of these."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the device's memory is full ({text}); train.accumulate=4 or model.image.checkpointing=true train the "
            "same in less, data.batch_size and eval.batch_size may be lower"
        )
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return f"{error.filename or 'a file'}: {error.strerror}; the checkpoints that were written before are whole"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return (
            f"a data loading process has died, of too little memory perhaps ({text}); train.py --resume RUN goes on "
            "from the last checkpoint, with fewer of them by --set data.workers=1"
        )
    if isinstance(error, RuntimeError) and world_size() > 1 and ("closed by peer" in text or "reset by peer" in text):
        return "another process has ended, see its message; train.py --resume RUN goes on from the last checkpoint"
    return None
