"""Program exit: the process that reports an error, and what is said before an error that hides a shortage."""

import errno
import re
import subprocess
import sys

import pytest

import train as train_program
from tests.helpers.configs import ROOT
from tests.helpers.programs import run_program
from utils import exit as exit_
from utils.errors import CheckpointError
from utils.exit import exit_on_user_error


def test_the_other_processes_let_the_first_one_speak(monkeypatch, capsys) -> None:
    """The error occurs before the process group is set up."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    arguments = ["--config", ROOT / "configs/irra.yaml", "--set", "train.epoch=3"]
    for number, said in (("0", "error: train.epoch"), ("1", "error (process 1): train.epoch")):
        layout = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        for name, value in layout.items():
            monkeypatch.setenv(name, value)
        status, _, err = run_program(train_program.main, monkeypatch, capsys, *arguments)
        assert status == 1 and err.startswith(said)
    assert waited == [5]


@pytest.mark.parametrize("argument", ["data.root=/\udcca", "name=\ud83d", "data.root=~/x", "$ODD/x"])
def test_an_argument_that_is_not_utf8_ends_in_one_line(argument: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", "/\udcca")
    monkeypatch.setenv("ODD", "/\udcca")
    opened: list[bool] = []
    monkeypatch.setattr(exit_, "open_console", lambda: opened.append(True))
    arguments = ["--config", ROOT / "configs/irra.yaml", "--set", argument]
    status, _, err = run_program(train_program.main, monkeypatch, capsys, *arguments)
    assert status == 1 and re.fullmatch(
        r"error: \S+( line)?: must be UTF-8, got '.*\\u?d.*'; rename the .*folder\n", err
    )
    assert opened


def test_a_shortage_behind_an_error_comes_first(monkeypatch, capsys) -> None:
    """A reader calls a good file damaged if it cannot be opened for lack of file handles."""

    def read() -> None:
        try:
            raise OSError(errno.EMFILE, "Too many open files", "last.pt")
        except OSError:
            raise CheckpointError("last.pt: damaged") from None

    def main() -> None:
        with exit_on_user_error():
            read()

    status, _, err = run_program(main, monkeypatch, capsys)
    assert status == 1 and re.fullmatch(r"error: too many open files .* ulimit -n .*\nlast\.pt: damaged\n", err)


def test_help_on_a_full_disk_ends_in_one_line() -> None:
    code = """
from utils.exit import exit_on_user_error
import argparse
with exit_on_user_error():
    argparse.ArgumentParser(description="text").parse_args()
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.startswith(b"error: standard output: No space left on device")
