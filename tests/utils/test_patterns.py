"""Regular expressions of configs: refused when they are malformed or take too long."""

import time

import pytest

from configs.schema import Rule, SolverConfig
from solver.optimizer import build_optimizer
from tests.helpers.tasks import tiny_task
from utils.errors import ConfigError
from utils.patterns import check_pattern, matches


def test_they_are_those_of_python() -> None:
    assert matches(r"(^|\.)bias$", "encoder.blocks.0.bias", "key") and not matches("^bias", "encoder.bias", "key")
    check_pattern(r"blocks\.\d+", "key")
    with pytest.raises(ConfigError, match=r"solver\.rules\[0\]\.match: must be a regular expression, got '\(' "):
        check_pattern("(", "solver.rules[0].match")


@pytest.mark.parametrize("pattern", [r"(.|\w)*(.|\w)*(.|\w)*biasq?[^s]$", r"(.|[a-z_.])*(.|[a-z_.])*weightq?[^t]$"])
def test_one_that_takes_too_long_is_refused(pattern: str) -> None:
    rules = [Rule("bias$", lr_mult=2.0), Rule(pattern, lr_mult=0.0)]
    started, message = time.monotonic(), r"solver\.rules\[1\]\.match: must be .* quick to search, got '.*takes longer"
    with pytest.raises(ConfigError, match=message):
        build_optimizer(SolverConfig(rules=rules), tiny_task().named_parameters())
    assert time.monotonic() - started < 10
