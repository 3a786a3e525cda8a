"""tools/teacher_readout.py: R@1 over one view of each person, with and without support sets."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from processor import training
from tests.helpers.configs import tiny_config
from tests.helpers.programs import run_program
from tools import teacher_readout
from utils.metrics import retrieval_metrics


@pytest.mark.parametrize("split, people", [("train", 8), ("test", 4)])
def test_the_read_out_ranks_one_view_of_each_person(
    split: str, people: int, teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(similarity: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
        seen.append((similarity, query_pids, gallery_pids))
        return retrieval_metrics(similarity, query_pids, gallery_pids)

    monkeypatch.setattr(teacher_readout, "retrieval_metrics", spy)
    rows = teacher_readout.read_out(teacher_run, split, "last", [])
    assert list(rows) == ["plain", "with support"]
    for similarity, queries, gallery in seen:
        assert similarity.shape == (people, people) and queries.tolist() == gallery.tolist() == list(range(people))
    assert not torch.allclose(seen[0][0], seen[1][0])


def test_the_read_out_as_a_program(teacher_run: Path, root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    status, out, _ = run_program(teacher_readout.main, monkeypatch, capsys, "--run", teacher_run, "--split", "test")
    assert status == 0 and "one view, test" in out and "with support" in out
    plain = training.train(tiny_config("baseline", root), tmp_path / "run")
    status, out, _ = run_program(teacher_readout.main, monkeypatch, capsys, "--run", plain, "--split", "test")
    assert status == 0 and "plain" in out and "with support" not in out
