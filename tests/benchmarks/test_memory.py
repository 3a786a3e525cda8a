"""benchmarks/memory.py: a row for each combination of micro-batches and activation checkpointing."""

from pathlib import Path

from benchmarks import memory
from tests.helpers.configs import config_of
from utils.config import to_yaml


def test_the_benchmark_of_memory_has_a_row_for_each_way(root: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(config_of("baseline", root)))
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *args: function(*args))
    rows = memory.table(str(tmp_path / "tiny.yaml"), [], 4, [1, 2], 1).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [
        *("whole batch", "2 micro-batches"),
        *("whole batch, checkpointing", "2 micro-batches, checkpointing"),
    ]
    assert len({row[-1] for row in cells}) == 1  # all rows have the same loss
