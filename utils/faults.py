"""Faults of the machine in plain words: full memory, a full disk, a killed process."""

import errno
import os

import torch

from utils.launcher import number_in
from utils.watchdog import workers

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


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
