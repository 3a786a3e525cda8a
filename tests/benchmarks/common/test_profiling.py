"""benchmarks/common/profiling.py: a process that is killed ends in one line, and nothing waits for it."""

import os
import signal

import pytest

from benchmarks.common.profiling import in_fresh_process
from utils.errors import TrainingError


def kill_yourself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_and_not_waited_for() -> None:
    assert in_fresh_process(os.path.basename, "a/b") == "b"
    with pytest.raises(TrainingError, match="the measured process was killed"):
        in_fresh_process(kill_yourself)
