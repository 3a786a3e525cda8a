"""Paths that users write: expansion, messages about them, and files that no program should open."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expand(path: str | Path) -> Path:
    """The path with a leading `~` and environment variables such as `$HOME` replaced; unknown ones stay."""
    return Path(expanded(str(path)))


def expanded(path: str) -> str:
    """The same for a text that may also be a hub name."""
    return os.path.expandvars(os.path.expanduser(path))


def names_variable(text: str) -> bool:
    """True if the text names an environment variable that is set."""
    return os.path.expandvars(text) != text


def in_full(path: str | Path) -> str:
    """The path for a message about a missing file; a relative one comes with the working directory."""
    return str(path) if Path(path).is_absolute() else f"{path} (relative to the working directory {os.getcwd()})"


def below(folder: Path, name: str) -> Path:
    """A file in a folder. A backslash in its name is a separator, as on Windows, unless such a file exists."""
    path = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not os.path.exists(path) else path


def why_not_a_file(path: str | Path) -> str | None:
    """Name the kind of a path that must not be read as a file, such as `a named pipe`; None for any other path.

    Reading a pipe or a device may never end, so readers ask first.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a null byte, or a letter that the file system lacks
        return None
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), None)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in an `OSError` of the body: those of writing have no name, and a temporary one says nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
