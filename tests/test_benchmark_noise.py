"""The noise benchmark trains what is missing, once, and tables Best and Last over seeds."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import train as train_program
from tests.conftest import ROOT, TINY
from tests.test_command_line import run_program
from tools import benchmark_noise


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """train.py's command lines, which are run in this process."""
    commands: list[list[str]] = []

    def run(command: list[str], **options) -> SimpleNamespace:
        commands.append(command)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", command[1:])
            try:
                train_program.main()
            except SystemExit as exit_:
                return SimpleNamespace(returncode=exit_.code)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Path:
    content = {"base": str(ROOT / "configs/baseline.yaml"), "name": "tiny"}
    for override in [*TINY, f"data.root={root}", "train.epochs=2", "solver.lr=1e-3"]:
        path, value = override.split("=", 1)
        place = content
        *parents, last = path.split(".")
        for name in parents:
            place = place.setdefault(name, {})  # type: ignore[assignment]
        place[last] = yaml.safe_load(value)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "tiny.yaml"


def test_what_is_missing_is_trained_and_tabled(
    in_process: list, config: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    runs = tmp_path / "runs"
    arguments = ["--configs", config, "--rates", "0", "0.5", "--runs", runs]
    program = benchmark_noise.main
    assert run_program(program, monkeypatch, capsys, *arguments, "--seeds", 1, "--set", "data.text_aug=0.1")[0] == 0
    assert len(in_process) == 2
    assert not (runs / "tiny_0_1/noise.npy").exists() and np.load(runs / "tiny_0.5_1/noise.npy").shape == (32,)
    assert "text_aug: 0.1" in (runs / "tiny_0_1/config.yaml").read_text()
    status, out, _ = run_program(program, monkeypatch, capsys, *arguments, "--seeds", 1, 2)
    assert status == 0 and len(in_process) == 4  # the first seed's runs are there
    assert "seed: 2" in (runs / "tiny_0.5_2/config.yaml").read_text()
    table = [line for line in out.splitlines() if line.startswith(("| 0%", "| 50%"))]
    assert [line.split(" | ")[:3] for line in table] == [
        ["| 0%", "tiny", "Best"],
        ["| 0%", "tiny", "Last"],
        ["| 50%", "tiny", "Best"],
        ["| 50%", "tiny", "Last"],
    ]
    for line, (rate, row) in zip(table, [(r, row) for r in ("0", "0.5") for row in ("Best", "Last")], strict=True):
        expected = []
        for seed in (1, 2):
            records = [
                json.loads(text) for text in (runs / f"tiny_{rate}_{seed}/metrics.jsonl").read_text().splitlines()
            ]
            record = max(records, key=lambda one: one["val"]["R1"]) if row == "Best" else records[-1]
            expected.append(record["test"])
        cells = line.strip("| ").split(" | ")
        means = [f"{np.mean([one[name] for one in expected]):.2f}" for name in ("R1", "R5", "R10", "mAP", "mINP")]
        assert cells[3:8] == means and cells[8] == ", ".join(f"{one['R1']:.2f}" for one in expected)
    shutil.rmtree(runs / "tiny_0.5_2")
    again = run_program(program, monkeypatch, capsys, *arguments, "--seeds", 1, 2, "--table")
    assert again[0] == 0 and len(in_process) == 4 and "| 50% | tiny | Best |" in again[1]


def test_mistakes_end_in_one_line(in_process: list, config: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["--configs", config, "--rates", "0.5", "--seeds", 1, "--runs", tmp_path / "runs"]
    program = benchmark_noise.main
    status, _, err = run_program(program, monkeypatch, capsys, *arguments, "--table")
    assert status == 1 and "holds no run that ended" in err and "Traceback" not in err
    (tmp_path / "runs/tiny_0.5_1").mkdir(parents=True)
    status, _, err = run_program(program, monkeypatch, capsys, *arguments)
    assert status == 1 and "did not end: python train.py --resume" in err
    status, _, err = run_program(
        program, monkeypatch, capsys, *arguments[:-2], "--runs", tmp_path / "b", "--set", "solver.lr=-1"
    )
    assert status == 1 and "solver.lr" in err
    arguments[3] = "1.5"
    status, _, err = run_program(program, monkeypatch, capsys, *arguments[:-2], "--runs", tmp_path / "c")
    assert status == 1 and "training failed" in err and "data.noise_rate" in err
