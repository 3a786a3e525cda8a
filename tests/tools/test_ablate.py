"""tools/ablate.py: trains the missing runs once, and tables Best and Last over seeds."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import train as train_program
from configs.schema import load_config
from processor.resolve import resolve
from tests.helpers.configs import ROOT, TINY
from tests.helpers.programs import run_program
from tools import ablate


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines of train.py, recorded and run in this process."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        commands.append(command[1:])
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
def ablation(root: Path, tmp_path: Path) -> Path:
    """Ablation file with two rows; the second starts from the weights of the first."""
    content = {
        "runs": str(tmp_path / "runs"),
        "seeds": [1, 2],
        "rows": {
            "plain": str(ROOT / "configs/baseline.yaml"),
            "noisy": {
                "config": str(ROOT / "configs/baseline.yaml"),
                "set": ["data.noise_rate=0.5", "init.path=${runs}/plain_${seed}/last.pt"],
            },
        },
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def everywhere(root: Path) -> list[str]:
    return ["--set", *TINY, f"data.root={root}", "train.epochs=2", "solver.lr=1e-3"]


def test_what_is_missing_is_trained_and_tabled(
    in_process: list, ablation: Path, everywhere: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    runs = tmp_path / "runs"
    program = ablate.main
    assert run_program(program, monkeypatch, capsys, ablation, *everywhere, "--seeds", 1)[0] == 0
    assert [command[4] for command in in_process] == [str(runs / "plain_1"), str(runs / "noisy_1")]
    config = load_config(runs / "noisy_1/config.yaml")
    assert (config.name, config.train.seed, config.data.noise_rate) == ("noisy", 1, 0.5)
    assert config.init.path == str(runs / "plain_1/last.pt")
    status, out, _ = run_program(program, monkeypatch, capsys, ablation, *everywhere)
    assert status == 0 and len(in_process) == 4  # the runs of the first seed exist
    assert load_config(runs / "plain_2/config.yaml").train.seed == 2
    rows = [(row, checkpoint) for row in ("plain", "noisy") for checkpoint in ("Best", "Last")]
    lines = out.splitlines()[-len(rows) :]
    for line, (row, checkpoint) in zip(lines, rows, strict=True):
        expected = []
        for seed in (1, 2):
            records = [json.loads(text) for text in (runs / f"{row}_{seed}/metrics.jsonl").read_text().splitlines()]
            record = max(records, key=lambda one: one["val"]["R1"]) if checkpoint == "Best" else records[-1]
            expected.append(record["test"])
        cells = line.strip("| ").split(" | ")
        means = [f"{np.mean([one[name] for one in expected]):.2f}" for name in ("R1", "R5", "R10", "mAP", "mINP")]
        assert cells == [row, checkpoint, *means, ", ".join(f"{one['R1']:.2f}" for one in expected)]
    shutil.rmtree(runs / "noisy_2")
    again = run_program(program, monkeypatch, capsys, ablation, *everywhere, "--table")
    assert again[0] == 0 and len(in_process) == 4 and lines[0] in again[1]
    seed = again[1].splitlines()[-1].strip("| ").split(" | ")
    assert seed[:2] == ["noisy", "Last"] and seed[2] == seed[-1]  # the seed that is left
    # A row with a changed config is not tabled with the metrics of its old runs.
    changed = run_program(program, monkeypatch, capsys, ablation, *everywhere, "solver.lr=2e-3", "--table")
    assert changed[0] == 1 and "plain_1: holds a run of another config" in changed[2]
    assert "  solver.lr: 0.001 -> 0.002" in changed[2]


def test_runs_that_did_not_end(
    in_process: list, ablation: Path, everywhere: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    run = tmp_path / "runs/plain_1"
    arguments = [ablation, *everywhere, "--seeds", 1]
    assert run_program(ablate.main, monkeypatch, capsys, *arguments)[0] == 0
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole.splitlines(keepends=True)[0])
    status, _, err = run_program(ablate.main, monkeypatch, capsys, *arguments)
    assert status == 1 and "plain_1: unfinished run" in err
    (run / "metrics.jsonl").write_text(whole[:-20])
    status, _, err = run_program(ablate.main, monkeypatch, capsys, *arguments, "--table")
    assert status == 1 and "metrics.jsonl: damaged" in err and f"--resume {run}" in err
    (run / "metrics.jsonl").write_text(whole.splitlines(keepends=True)[0])
    assert len(in_process) == 2
    assert run_program(ablate.main, monkeypatch, capsys, *arguments, "--resume")[0] == 0
    assert in_process[2:] == [["train.py", "--resume", str(run)]] and (run / "metrics.jsonl").read_text() == whole


def test_mistakes_end_in_one_line_before_anything_is_trained(
    in_process: list, ablation: Path, everywhere: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    def error(*arguments: object) -> str:
        status, _, err = run_program(ablate.main, monkeypatch, capsys, ablation, *everywhere, *arguments)
        assert status == 1 and "Traceback" not in err
        return err

    assert "has no finished run of this ablation" in error("--table")
    assert "solver.lr" in error("solver.lr=-1")
    assert "data.nose_rate: unknown key; did you mean 'noise_rate'?" in error("data.nose_rate=1")
    content = yaml.safe_load(ablation.read_text())
    for change, message in {
        "row: plain": "row: unknown key; did you mean 'rows'?",
        "rows: {plain: {confg: configs/irra.yaml}}": "rows.plain.confg: unknown key; did you mean 'config'?",
        "rows: {plain: {set: []}}": "rows.plain.config",
        "rows: {plain: configs/ira.yaml}": "no such config file",
        "rows: {plain: '${run}/x.yaml'}": "run",
        "seeds: one": "seeds",
        "seeds: []": "needs at least one row and one seed",
        "rows: {}": "needs at least one row and one seed",
    }.items():
        ablation.write_text(yaml.safe_dump({**content, **yaml.safe_load(change)}, sort_keys=False))
        assert message in error(), change
    assert not in_process and not (tmp_path / "runs").exists()


def test_a_training_that_fails_is_named(
    in_process: list, ablation: Path, everywhere: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    arguments = [ablation, *everywhere, f"data.root={tmp_path}", "data.dataset=rstpreid", "--runs", tmp_path / "b"]
    status, _, err = run_program(ablate.main, monkeypatch, capsys, *arguments)
    assert status == 1 and f"training failed, see above: python train.py --config {ROOT}/configs/baseline.yaml" in err
    assert len(in_process) == 1 and str(tmp_path / "b/plain_1") in err


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_ours_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = list(ablate.planned(path, None, None, []))
    assert len({run.folder for run in runs}) == len(runs)
    configs = {run.folder: resolve(load_config(run.config, run.overrides)) for run in runs}
    for config in configs.values():
        if config.teacher.checkpoint is not None:  # from a row above, with the same seed
            teacher = configs[Path(config.teacher.checkpoint).parent]
            assert teacher.train.seed == config.train.seed
            assert (teacher.data.support_images, teacher.data.support_captions) == (
                config.data.support_images,
                config.data.support_captions,
            )
