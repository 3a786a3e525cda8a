"""processor/profile.py: a trace of a few steps in the run folder."""

import json
from pathlib import Path

import pytest

from processor import training
from tests.helpers.configs import config_of


@pytest.mark.parametrize("steps, traced", [(2, 2), (50, 5)])  # a run of 8 steps, 3 of which warm up
def test_a_trace_and_a_table_of_operators_are_written(steps: int, traced: int, root: Path, tmp_path: Path) -> None:
    config = config_of("baseline", root, f"train.profile={steps}", "train.epochs=2")
    run = training.train(config, tmp_path / "run")
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert sum(name.startswith("Optimizer.step") for name in names) == traced
    assert "aten::addmm" in (run / "trace.txt").read_text()
    assert f"profile of {traced} steps: {run}/trace.json" in (run / "train.log").read_text()


def test_without_it_nothing_is_written(root: Path, tmp_path: Path) -> None:
    run = training.train(config_of("baseline", root), tmp_path / "run")
    assert not list(run.glob("trace*"))
