"""utils/console.py: no console stops a program."""

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.configs import ROOT

START = "import sys; from utils import console; console.PATIENCE = 0.05; console.open_console(); "


def run(code: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run code with an open console in a process of its own."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-c", START + code], cwd=ROOT, timeout=60, check=False, **streams)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8"])
def test_letters_that_the_encoding_lacks_are_escaped(encoding: str) -> None:
    code = r"print('\u5b9e', '\udcca'); print('\u9a8c', '\udcca', file=sys.stderr)"
    done = run(code, env={**os.environ, "PYTHONIOENCODING": encoding})
    shown = ["\u5b9e", "\u9a8c"] if encoding == "utf-8" else ["\\u5b9e", "\\u9a8c"]
    assert done.returncode == 0
    assert [done.stdout.decode(), done.stderr.decode()] == [f"{letter} \\udcca\n" for letter in shown]


CHATTER = "[print('line', number, file=stream) for number in range(20000) for stream in (sys.stdout, sys.stderr)]"


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_closed_pipe_is_no_error(flags: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *flags, "-c", f"{START}{CHATTER}; sys.exit(7)"]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False, stdout=writer, stderr=writer).returncode == 7
    os.close(writer)


def test_a_full_pipe_is_waited_for_once() -> None:
    reader, writer = os.pipe()
    assert run(f"{CHATTER}; sys.exit(7)", stdout=writer, stderr=writer).returncode == 7
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read(7) == b"line 0\n"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_from_the_start_are_no_error(redirection: str) -> None:
    command = f'exec "$0" -c "$1" {redirection}'
    arguments = ["sh", "-c", command, sys.executable, f"{START}{CHATTER}; sys.exit(7)"]
    assert subprocess.run(arguments, cwd=ROOT, timeout=60, check=False, capture_output=True).returncode == 7


def test_a_full_disk_is_said_once() -> None:
    code = "print('x')\ntry:\n sys.stdout.flush()\nexcept OSError as error:\n print(error, file=sys.stderr)\nprint('y')"
    with open("/dev/full", "wb") as full:
        done = run(code, stdout=full)
        assert done.returncode == 0
        assert done.stderr.decode() == "[Errno 28] No space left on device: 'standard output'\n"
        assert run(f"{CHATTER.replace('sys.stdout, ', 'sys.stderr, ')}; sys.exit(7)", stderr=full).returncode == 7


def test_the_streams_of_a_notebook_or_a_test_stay(capsys: pytest.CaptureFixture[str]) -> None:
    from utils.console import open_console

    before = sys.stdout
    open_console()
    assert sys.stdout is before
