"""The run folder: names, the one writer, starts that fail, and what a resume checks."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

import train as train_program
import utils.files
from configs.schema import load_config
from processor import training
from processor.run_folder import create_run_folder
from processor.trainer import Trainer
from tests.helpers.configs import config_of
from tests.helpers.programs import run_program
from tests.helpers.runs import Killed, die_after, same_runs
from utils.config import to_yaml
from utils.errors import CheckpointError, ConfigError, TrainingError
from utils.files import locked


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished run of two epochs."""
    return training.train(config_of("irra", root, "train.epochs=2"), tmp_path_factory.mktemp("straight") / "run")


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


def content_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name not in (".lock", "train.log")}


def test_automatic_names_never_collide(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20260101_120000")
    config = config_of("irra", root, f"train.output={tmp_path}")
    names = [create_run_folder(config, None).name for _ in range(3)]
    assert names == [f"20260101_120000_irra{suffix}" for suffix in ("", "_2", "_3")]


def test_a_second_writer_is_refused(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(utils.files, "PATIENCE", 0.1)
    before = content_of(run)
    with locked(run), pytest.raises(ConfigError, match="another process writes to this run"):
        training.resume(run, [])
    assert content_of(run) == before


def test_a_start_that_fails_leaves_no_folder(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def fails(self: Trainer) -> None:
        raise TrainingError("no training today")

    monkeypatch.setattr(Trainer, "fit", fails)
    (tmp_path / "config.yaml").write_text(to_yaml(config_of("irra", root)))
    arguments = ["--config", tmp_path / "config.yaml", "--run", tmp_path / "run"]
    status, _, err = run_program(train_program.main, monkeypatch, capsys, *arguments)
    assert (status, err) == (1, "error: no training today\n") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("signal, status", [(KeyboardInterrupt(), 130), (TrainingError("NaN"), 1)])
def test_the_last_line_after_an_interruption_resumes(signal, status, run: Path, monkeypatch, capsys) -> None:
    def interrupted(self: Trainer) -> None:
        raise signal

    monkeypatch.setattr(Trainer, "fit", interrupted)
    found, _, err = run_program(train_program.main, monkeypatch, capsys, "--resume", run)
    assert found == status and err.splitlines()[-1] == f"resume with: python train.py --resume {run}"


def test_a_run_without_a_checkpoint_starts_from_the_beginning(root: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    create_run_folder(config_of("irra", root, "train.epochs=2"), run)  # and killed right after
    training.resume(run, [])
    same_runs(straight, run)
    (run / "last.pt").unlink()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        training.resume(run, [])  # would lose best.pt


@pytest.mark.parametrize(
    "damaged", [b"", b"\x00" * 300, b"data: {epochs", None], ids=["empty", "zeroed", "cut", "missing"]
)
def test_a_damaged_config_is_read_from_the_checkpoint(damaged: bytes | None, run: Path, straight: Path) -> None:
    path = run / "config.yaml"
    path.unlink() if damaged is None else path.write_bytes(damaged)
    training.resume(run, [])
    assert path.read_bytes() == (straight / "config.yaml").read_bytes()
    same_runs(straight, run)


@pytest.mark.parametrize("edit", [("seed: 1", "seed: 7"), ("  lr: 1", "  lr: 1000")])
def test_an_edited_config_is_another_experiment(edit: tuple[str, str], run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace(*edit))
    before = content_of(run)
    with pytest.raises(ConfigError, match=rf"(?s)another experiment.*{edit[0].split(':')[0].strip()}: .* -> "):
        training.resume(run, [])
    assert content_of(run) == before


def test_a_wrong_edit_is_no_damage(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("epochs: 2", "epochs: two"))
    with pytest.raises(ConfigError, match=r"train\.epochs: must be an integer, got 'two'"):
        training.resume(run, [])


def test_changed_annotations_are_another_experiment(root: Path, straight: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("*/*.json")
    moved = [f"data.root={tmp_path / 'data'}"]
    training.resume(run, moved)  # the same data elsewhere
    rows = json.loads(file.read_text())
    rows[0]["captions"][0] += " again"
    file.write_text(json.dumps(rows))
    before = content_of(run)
    with pytest.raises(ConfigError, match=r"content of these files has changed since the run began: annotations"):
        training.resume(run, moved)
    assert content_of(run) == before
    training.resume(run, moved, force=True)


def test_another_length_says_both_rates(run: Path) -> None:
    training.resume(run, ["train.epochs=4"])
    (line,) = re.findall(r"train\.epochs: 2 -> 4.*", (run / "train.log").read_text())
    rates = [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"epoch 2 had {rates[1]:.2e}, epoch 3 has {rates[2]:.2e}" in line


def test_a_length_that_is_passed_is_refused(run: Path) -> None:
    before = content_of(run)
    with pytest.raises(ConfigError, match=r"train\.epochs: must be more than the 2 epochs that .* completed, got 1"):
        training.resume(run, ["train.epochs=1"])
    assert content_of(run) == before


def test_an_evaluation_that_fails_does_not_cost_the_epoch(root: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:

        def fails(self: Trainer, epoch: int) -> None:
            raise TrainingError("no evaluation today")

        patch.setattr(Trainer, "_evaluate", fails)
        with pytest.raises(TrainingError):
            training.train(config_of("irra", root, "train.epochs=2"), run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", lambda self, *arguments: pytest.fail("the epoch is trained already"))
        die_after(patch, 1)
        with pytest.raises(Killed):
            training.resume(run, [])
    assert load_config(run / "config.yaml").train.epochs == 2
    training.resume(run, [])
    same_runs(straight, run)
