"""Faults of the machine in plain words: memory, threads, file handles, shared memory, disks, killed processes.

Imports no torch, so that a program can report its errors before that slow import.
"""

import errno
import os
import re
import sys
import threading
from collections.abc import Iterator

from utils.launcher import number_in

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
HANDLES = (errno.EMFILE, errno.ENFILE)
MEMORY = re.compile(r"MemoryError|DefaultCPUAllocator|std::bad_alloc|[Oo]ut of memory|Unable to allocate .* an array")
DEVICE_MEMORY = re.compile(r"(CUDA|HIP|MPS|XPU|NPU)\b.*out of memory|ALLOC_FAILED")
TORCH_WRITER = re.compile(r"unexpected pos|PytorchStreamWriter failed")  # torch's words for a write that failed
FROM_WORKER = "Caught "  # torch puts a worker's traceback behind it, with the error in the last line
MORE_SHARED_MEMORY = "set data.workers=0, or enlarge it, as with docker run --shm-size=8g"


def machine_fault(error: BaseException) -> str | None:
    """Message for a fault of the machine, with its remedy; None for other errors."""
    text = _text(error)
    if _is_of_torch(error, "OutOfMemoryError") or DEVICE_MEMORY.search(text):
        return (
            f"out of device memory ({text}); set train.accumulate=4 or model.image.checkpointing=true, which train the "
            "same with less memory, or lower data.batch_size or eval.batch_size"
        )
    return shortage(error) or _disk_message(error) or _process_fault(error, text)


def shortage(error: BaseException) -> str | None:
    """Message for too little shared memory, memory, or too few file handles or threads, whatever was tried."""
    text = _text(error)
    if _is(error, HANDLES) or "items of ancdata" in text:
        return f"too many open files ({text}); raise the limit, as with ulimit -n 65536, or lower data.workers"
    if isinstance(error, MemoryError) or _is(error, (errno.ENOMEM,)) or MEMORY.search(text):
        return (
            f"out of memory ({text}); set train.accumulate=4, which trains the same with less memory, or lower "
            "data.batch_size, eval.batch_size or data.workers"
        )
    if _is_shared_memory(error, text):
        return f"/dev/shm: too little shared memory for the data loading workers ({text}); {MORE_SHARED_MEMORY}"
    forked = isinstance(error, BlockingIOError) and _raised_in(error, "multiprocessing")
    if forked or "can't start new thread" in text:
        return (
            f"no more threads or processes can be started ({text}); raise the limit (ulimit -u, or a container's "
            "--pids-limit), or lower data.workers and OMP_NUM_THREADS"
        )
    return None


def behind(error: BaseException) -> str | None:
    """The shortage behind an error that a reader raised in place of it, such as for a file called damaged."""
    return next((found for one in _chain(error) if (found := shortage(one))), None)


def disk_fault(error: BaseException) -> str | None:
    """The operating system's words for a disk that is full, read-only or broken; None for other errors."""
    if TORCH_WRITER.search(str(error)):
        hidden = (disk_fault(one) for one in _chain(error) if isinstance(one, OSError))
        return next(filter(None, hidden), "the disk is full or cannot be written")
    return next((os.strerror(number) for number in DISK if _is(error, (number,))), None)


def report_of_thread(details: threading.ExceptHookArgs) -> None:
    """Report a fault of the machine in a library's thread in one line (`threading.excepthook`).

    Disks are left to the main thread, to which the writers of trackers hand their error.
    """
    error = details.exc_value
    if error is None or (machine_fault(error) is None):
        threading.__excepthook__(details)
    elif disk_fault(error) is None:
        print(f"warning: {machine_fault(error)}", file=sys.stderr)


def _disk_message(error: BaseException) -> str | None:
    if (fault := disk_fault(error)) is None:
        return None
    return f"{getattr(error, 'filename', None) or 'a file'}: {fault}; earlier checkpoints are intact"


def _process_fault(error: BaseException, text: str) -> str | None:
    """Message for a process that died or does not answer."""
    if not isinstance(error, RuntimeError):
        return None
    if text.startswith("DataLoader worker") or text.startswith("Pin memory thread exited"):
        return (
            f"a data loading worker died, perhaps for lack of memory ({text}); use fewer workers, for instance "
            "--set data.workers=1"
        )
    if text.startswith("DataLoader timed out"):
        from utils.watchdog import workers  # imports torch

        states = "; ".join(f"{who}: {problem or 'at work'}" for who, problem in workers())
        return (
            f"no batch for data.timeout seconds ({states}); look for a slow or dead disk, raise data.timeout, or set "
            "data.workers=0 to see the file that hangs"
        )
    several = number_in(os.environ, "WORLD_SIZE") > 1  # known before the processes have met
    if several and ("Timed out" in text or "timed out" in text):
        return f"another process did not answer for train.timeout seconds ({text}); see the warnings above"
    if several and ("closed by peer" in text or "reset by peer" in text):
        return "another process ended, see its message; resume from the last checkpoint with train.py --resume RUN"
    return None


def _is_shared_memory(error: BaseException, text: str) -> bool:
    """True for torch's shared tensors, a worker that died of a full /dev/shm, and Python's semaphores."""
    if isinstance(error, RuntimeError) and "Bus error" in text:
        return True
    if isinstance(error, OSError) and _raised_in(error, "multiprocessing.synchronize"):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"shared memory|mmap|</torch_", text))


def _text(error: BaseException) -> str:
    """The line of an error's message that names it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if lines[0].startswith(FROM_WORKER) else lines[0]


def _is(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """True for an error with one of these numbers; other languages' libraries only give the system's words for it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    text = _text(error)
    return any(os.strerror(number) in text for number in numbers)


def _is_of_torch(error: BaseException, name: str) -> bool:
    """True for a subclass of a class of torch, which is not imported for it."""
    return any(one.__name__ == name and one.__module__.startswith("torch") for one in type(error).__mro__)


def _raised_in(error: BaseException, module: str) -> bool:
    """True if the innermost frame is of the module or package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and f"{trace.tb_frame.f_globals.get('__name__')}.".startswith(f"{module}.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The errors that an error was raised from, or in the handling of."""
    while (before := error.__cause__ or error.__context__) is not None:
        yield before
        error = before
