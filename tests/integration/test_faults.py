"""Faults of the machine during a run: full disks, killed processes (docs/faults.md lists all faults)."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import processor.saving as saving_module
import train as train_program
from datasets.pairs import TrainPairs
from processor.trainer import Trainer
from tests.helpers.configs import config_of
from tests.helpers.processes import together
from tests.helpers.programs import run_program
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.faults import machine_fault
from utils.logger import LOGGER


def test_a_disk_that_fills_up_stops_training_with_one_line(
    root: Path, tmp_path: Path, small_disk, monkeypatch, capsys
) -> None:
    def filling_up(path: Path, content: dict[str, Any]) -> None:
        if content["epoch"] == 2:
            small_disk(20_000)
        save_checkpoint(path, content)

    monkeypatch.setattr(saving_module, "save_checkpoint", filling_up)
    config = tmp_path / "config.yaml"
    config.write_text(train_program.to_yaml(config_of("irra", root, "train.epochs=3")))
    run = tmp_path / "run"
    status, _, err = run_program(train_program.main, monkeypatch, capsys, "--config", config, "--run", run)
    assert status == 1 and re.fullmatch(r"error: \S+\.pt: cannot be written \(.*\)\nresume with: .*\n", err)
    assert load_checkpoint(run / "last.pt")["epoch"] == 1
    assert not list(run.glob(".*.tmp"))


def test_a_log_that_cannot_be_written_is_no_traceback(root: Path, tmp_path: Path, small_disk, monkeypatch, capsys):
    run = tmp_path / "run"

    def fills_up(path: Path, content: dict[str, Any]) -> None:
        small_disk(10)
        LOGGER.info("which the file has no room for")

    monkeypatch.setattr(saving_module, "save_checkpoint", fills_up)
    config = tmp_path / "config.yaml"
    config.write_text(train_program.to_yaml(config_of("irra", root)))
    status, _, err = run_program(train_program.main, monkeypatch, capsys, "--config", config, "--run", run)
    assert status == 1 and re.fullmatch(r"error: .*earlier checkpoints are intact\nresume with: .*\n", err)


def test_a_data_loading_process_that_is_killed(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    load = TrainPairs.__getitem__

    def killed(self: TrainPairs, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None and int(self._epoch) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, index)

    monkeypatch.setattr(TrainPairs, "__getitem__", killed)
    config = tmp_path / "config.yaml"
    config.write_text(train_program.to_yaml(config_of("irra", root, "train.epochs=3", "data.workers=1")))
    run = tmp_path / "run"
    status, _, err = run_program(train_program.main, monkeypatch, capsys, "--config", config, "--run", run)
    assert status == 1 and err.startswith("error: a data loading worker died") and "--resume" in err
    assert "Traceback" not in err and load_checkpoint(run / "last.pt")["epoch"] == 1


def _until_killed(config: Any, run: Path) -> None:
    save = Trainer._save

    def dies(self: Trainer) -> None:
        save(self)
        if self.batches == 0 and train_program.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._save = dies  # type: ignore[method-assign]  # this process only runs this test
    try:
        train_program.train(config, run)
    except RuntimeError as error:
        raise AssertionError(f"said: {machine_fault(error)}") from None


@pytest.mark.timeout(60)
def test_a_process_that_is_killed_ends_the_others(root: Path, tmp_path: Path) -> None:
    config = config_of("irra", root, "train.epochs=3")
    with pytest.raises(AssertionError, match="said: another process ended"):
        together(2, _until_killed, config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1
    train_program.resume(tmp_path / "run", [])  # in one process
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 3
