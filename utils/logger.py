"""Output of a run: log lines on the console and in a file, progress bars, tables, metrics.jsonl."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.distributed import rank
from utils.paths import naming

LOGGER = logging.getLogger("tipr")


class _ProgressBarHandler(logging.Handler):
    """Writes log lines above a progress bar.

    Args:
        needed: False if a file has the lines too, so that a full disk behind the console is ignored.
    """

    def __init__(self, *, needed: bool) -> None:
        super().__init__()
        self.needed = needed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            if self.needed:
                raise


class _LogFile(logging.FileHandler):
    """Ignores lines that cannot be written; the next checkpoint reports the full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def start_logging(file: Path | None = None) -> None:
    """Log to stdout, and to `file` if given."""
    handlers: list[logging.Handler] = [_ProgressBarHandler(needed=file is None)]
    if file is not None:
        handlers.append(_LogFile(file, encoding="utf-8", errors="backslashreplace"))
    for handler in LOGGER.handlers[:]:
        LOGGER.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def progress(items: Iterable[Any], what: str, **options: Any) -> "tqdm[Any]":
    """A progress bar that disappears at its end; shown on terminals, by the first process only."""
    return tqdm(items, desc=what, leave=False, disable=True if rank() else None, **options)


def format_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a boxed text table; floats get two decimals."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    lines = [
        "|" + "|".join(f" {cell:^{width}} " for cell, width in zip(row, widths, strict=True)) + "|" for row in cells
    ]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def json_line(record: Mapping[str, Any]) -> str:
    """A line of a .jsonl file."""
    return json.dumps(record) + "\n"


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line to a .jsonl file."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json_line(record))
