"""tools/trim_runs: finished runs lose their training state, others nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from processor import training
from tests.helpers.configs import config_of
from tests.helpers.programs import evaluate, run_program
from tools import trim_runs
from utils.checkpoint import load_checkpoint
from utils.errors import CheckpointError


def test_finished_runs_are_trimmed_when_asked(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    runs = tmp_path / "runs"
    done = training.train(config_of("irra", root, "train.epochs=2"), runs / "a/done")
    unfinished = Path(shutil.copytree(done, runs / "unfinished"))
    lines = (unfinished / "metrics.jsonl").read_text().splitlines()
    (unfinished / "metrics.jsonl").write_text(lines[0] + "\n")
    assert len(json.loads(lines[1])) > 3
    whole, metrics = {path: path.read_bytes() for path in runs.rglob("*.pt")}, evaluate("--run", done)

    status, out, _ = run_program(trim_runs.main, monkeypatch, capsys, runs)
    assert status == 0 and "would be trimmed" in out and "unfinished: left alone" in out and "add --apply" in out
    assert whole == {path: path.read_bytes() for path in runs.rglob("*.pt")}

    status, out, _ = run_program(trim_runs.main, monkeypatch, capsys, runs, "--apply")
    assert status == 0 and "freed" in out
    assert whole[unfinished / "last.pt"] == (unfinished / "last.pt").read_bytes()
    assert (done / "last.pt").stat().st_size < 0.5 * len(whole[done / "last.pt"])
    assert evaluate("--run", done) == metrics
    with pytest.raises(CheckpointError, match="has no training state to resume from"):
        training.resume(done, [])

    run_program(trim_runs.main, monkeypatch, capsys, runs, "--apply", "--precision", "bf16")
    weights = load_checkpoint(done / "last.pt")["model"]
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.bfloat16}
    assert "nothing to trim" in run_program(trim_runs.main, monkeypatch, capsys, runs, "--apply")[1]


def test_a_folder_without_runs_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    status, _, err = run_program(trim_runs.main, monkeypatch, capsys, tmp_path)
    assert status == 1 and err == f"error: {tmp_path}: no run folders with checkpoints there\n"
