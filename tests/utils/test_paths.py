"""utils/paths.py: expansion, messages about missing files, and files that are none."""

import os
from pathlib import Path

import pytest

from utils.paths import expand, in_full, why_not_a_file


def test_home_and_variables_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/kim")
    monkeypatch.setenv("DATA", "/data/sets")
    assert expand("~/runs") == Path("/home/kim/runs")
    assert expand("$DATA/cuhk") == expand("${DATA}/cuhk") == Path("/data/sets/cuhk")
    assert expand("$UNKNOWN_VARIABLE/x") == Path("$UNKNOWN_VARIABLE/x")
    assert expand("a/~/b") == Path("a/~/b")


def test_a_relative_path_comes_with_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_full("data/x") == f"data/x (relative to the working directory {tmp_path})"
    assert in_full(tmp_path / "x") == str(tmp_path / "x")


def test_pipes_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    assert why_not_a_file(tmp_path / "pipe") == "a named pipe"
    assert why_not_a_file("/dev/null") == "a device"
    assert why_not_a_file(tmp_path) == "a folder"
    assert why_not_a_file(tmp_path / "file") is None
    assert why_not_a_file(tmp_path / "missing") is None
