"""benchmarks/common/step_timing.py: a line of output for each way of doing a step."""

from pathlib import Path

import pytest
import torch

from benchmarks import distillation, token_selection
from benchmarks.common import step_timing
from configs.schema import Config
from model.task import RetrievalTask
from processor.random_batch import random_batch
from tests.helpers.configs import tiny_config
from utils.config import to_yaml


@pytest.mark.parametrize("tool, method", [(token_selection, "rde"), (distillation, "lcr2s")])
def test_the_benchmarks_of_steps_print_a_line_for_each_way(
    tool, method: str, root: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_config(method, root)))

    def build(way: str, config: Config) -> RetrievalTask:
        own = [tiny_config("lcr2s_teacher", root)] if method == "lcr2s" else []
        return tool.build(way, config, *own)

    monkeypatch.setattr("sys.argv", ["program", "--batch", "2", "--steps", "1"])
    step_timing.steps_program("", str(tmp_path / "tiny.yaml"), tool.WAYS, build)
    lines = capsys.readouterr().out.splitlines()
    assert "2 pairs" in lines[0] and lines[2].endswith(f"x {tool.WAYS[0]} |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4 : 4 + len(tool.WAYS)]]
    assert [row[0] for row in rows] == list(tool.WAYS) and rows[0][-1] == "1.00"


def test_a_step_trains(root: Path) -> None:
    config = tiny_config("irra", root)
    seconds, _, loss = step_timing.cost_of_steps(config, 4, 1)
    step = step_timing.step_of(config)
    before = [parameter.clone() for parameter in step.task.parameters()]
    step(random_batch(config, 4, 1024, step.task.inputs))
    assert seconds > 0 and loss > 0
    changed = [not torch.equal(one, other) for one, other in zip(before, step.task.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    assert all(parameter.grad is None for parameter in step.task.parameters())
