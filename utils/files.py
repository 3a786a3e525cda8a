"""Files that survive kills and second writers: atomic replacement, and a lock for the folder of a run."""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from utils.errors import ConfigError
from utils.logger import LOGGER
from utils.paths import naming

LOCK = ".lock"
PATIENCE = 10.0  # seconds to wait for a lock: data loading workers outlive a killed process by up to five


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` at the end, so that a kill leaves the old file or the new one.

    Args:
        path: file to write. It stays as it is if the body raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with naming(path):
        descriptor = os.open(temporary, flags, 0o666)
        try:
            with open(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in place of an existing one, as `replacing` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file in place of an existing one, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one writer of a run folder. The lock ends with the process, however it ends.

    Raises:
        ConfigError: another process writes to the folder.
    """
    lock = FileLock(folder / LOCK, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with contextlib.suppress(OSError):
            holder = (folder / LOCK).read_text().strip()
        raise ConfigError(
            f"{folder}: another process writes to this run ({holder or 'unknown'}); wait for it, or end it first"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        LOGGER.warning("%s: cannot be locked (%s); start no second process in this run folder", folder, error)
    try:
        with contextlib.suppress(OSError):  # for the message above
            (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        for left_behind in folder.glob(".*.tmp"):  # by a process that was killed while it wrote
            left_behind.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
