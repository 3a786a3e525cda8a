"""utils/logger.py: log lines on the console and in a file."""

import errno
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.logger import LOGGER, append_json_line, start_logging


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    start_logging()


def test_half_a_surrogate_pair_is_escaped_in_the_file(tmp_path: Path) -> None:
    start_logging(tmp_path / "train.log")
    LOGGER.info("%s", "red \ud83d \u5b9e")
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith("red \\ud83d \u5b9e\n")
    append_json_line(tmp_path / "metrics.jsonl", {"name": "red \ud83d"})
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"name": "red \\ud83d"}\n'


class FullDisk(io.StringIO):
    """A console that is redirected to a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_behind_the_console_stops_only_what_has_no_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout", FullDisk())
    start_logging(tmp_path / "train.log")
    LOGGER.info("kept")
    assert (tmp_path / "train.log").read_text().endswith("kept\n")
    start_logging()
    with pytest.raises(OSError, match="No space left"):
        LOGGER.info("lost")
