"""Standard output and error that never stop a program: other encodings, closed and full pipes."""

import errno
import io
import os
import select
import sys
from typing import Any

PATIENCE = 10.0  # seconds to wait for a pipe or terminal that takes nothing, such as one stopped by Ctrl-S
CHUNK = getattr(select, "PIPE_BUF", 4096)  # bytes that a pipe takes at once when it takes any
NOBODY_READS = {errno.EPIPE, errno.EIO, errno.EBADF, errno.EINVAL}  # EINVAL: Windows' code for a closed pipe


class _Console(io.RawIOBase):
    """The bytes of a console. They are lost while nobody reads them.

    Args:
        raw: stream to write to.
        name: its name in messages about a full disk, which are raised once; None for no messages.
    """

    def __init__(self, raw: Any, name: str | None) -> None:
        self._raw, self._name, self._patience = raw, name, PATIENCE

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def write(self, data: Any, /) -> int:
        data = memoryview(data)
        if not self._ready():
            return len(data)
        try:
            return self._raw.write(data[:CHUNK]) or len(data)
        except OSError as error:
            name, self._name = self._name, None
            if name is None or error.errno in NOBODY_READS:
                return len(data)
            raise OSError(error.errno, error.strerror, name) from None

    def _ready(self) -> bool:
        try:
            ready = bool(select.select([], [self._raw], [], self._patience)[1])
        except (OSError, ValueError):  # Windows asks sockets only
            return True
        self._patience = PATIENCE if ready else 0
        return ready


def open_console() -> None:
    """Let standard output and error escape letters that their encoding lacks, and go on when nobody reads them."""
    sys.stdout = _opened(sys.stdout, sys.__stdout__, "standard output")
    sys.stderr = _opened(sys.stderr, sys.__stderr__, None)


def _opened(stream: Any, original: Any, name: str | None) -> Any:
    if stream is None:  # closed by the caller
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not original or not isinstance(stream, io.TextIOWrapper):  # replaced by a notebook or a test
        return stream
    stream.flush()
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return io.TextIOWrapper(
        io.BufferedWriter(_Console(raw, name)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
