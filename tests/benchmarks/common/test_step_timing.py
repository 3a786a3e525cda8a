"""benchmarks/common/step_timing.py: a line of output for each way of doing a step."""

from pathlib import Path

import pytest

from benchmarks import distillation, token_selection
from benchmarks.common import step_timing
from configs.schema import Config
from model.task import RetrievalTask
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
    assert "2 pairs, 1 steps each" in lines[0] and len(lines) == 1 + len(tool.WAYS)
    assert f"1.00 x {tool.WAYS[0]}" in lines[1]
