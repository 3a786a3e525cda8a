"""Atomic replacement of files, and the lock of a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import utils.files as files
from tests.helpers.configs import ROOT
from utils.errors import ConfigError
from utils.files import locked, replacing, write_bytes, write_text
from utils.logger import append_json_line


def test_a_file_is_replaced_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    write_text(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü" and os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_use_different_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as one, replacing(path) as two:
        one.write(b"1" * 10)
        two.write(b"2" * 5)
    assert path.read_bytes() == b"1" * 10  # the last to end, and complete


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "0")
    (tmp_path / f".a.txt.{os.getpid()}.0.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a.txt", "text")
    assert not (tmp_path / "victim").exists()


HOLD = (
    "import sys, pathlib, utils.files as f\nwith f.locked(pathlib.Path(sys.argv[1])): print('in', flush=True); input()"
)


def test_a_folder_has_one_writer_and_a_dead_one_leaves_no_lock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    (tmp_path / ".last.pt.1.ab.tmp").write_text("left behind")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "in\n"
        assert not list(tmp_path.glob(".*.tmp"))
        with pytest.raises(ConfigError, match=rf"another process writes to this run \(process {other.pid} on .*\)"):
            locked(tmp_path).__enter__()
        other.kill()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / files.LOCK).read_text()


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks available")])
def test_a_file_system_without_locks_is_warned_of(error: Exception, tmp_path: Path, monkeypatch) -> None:
    def refuses(self: object, *arguments: object) -> None:
        raise error

    said: list[str] = []
    monkeypatch.setattr(files.FileLock, "acquire", refuses)
    monkeypatch.setattr(files.LOGGER, "warning", lambda text, *values: said.append(text % values))
    with locked(tmp_path):
        write_text(tmp_path / "a.txt", "text")
    assert len(said) == 1 and "cannot be locked" in said[0]


def test_an_error_of_writing_names_the_file(tmp_path: Path, small_disk) -> None:
    small_disk(100)
    for write in (write_bytes, lambda path, content: append_json_line(path, {"a": "b" * len(content)})):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "metrics.jsonl", b"0" * 10_000)
        assert caught.value.filename == str(tmp_path / "metrics.jsonl")
