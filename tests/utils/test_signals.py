"""Signals: one line at any moment, a checkpoint at the next step, and workers that leave them to the main process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train as train_program
from datasets.loaders import data_loader
from processor import training
from processor.engine import Engine
from tests.helpers.configs import ROOT, config_of
from tests.helpers.processes import together
from tests.helpers.programs import run_program
from tests.helpers.runs import FAST, same_runs
from utils.checkpoint import load_checkpoint
from utils.signals import STOPPING, Interrupted, StopRequest, signals_raise

NEVER_SAVED = "train.save_every_steps=null"


def signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int, process: int = 0) -> None:
    """Send this process a signal while it is in a step."""
    update, steps = Engine.update, iter(range(1, 10**6))

    def interrupted(self: Engine) -> None:
        if next(steps) == step and int(os.environ.get("RANK", 0)) == process:
            os.kill(os.getpid(), number)
        update(self)

    monkeypatch.setattr(Engine, "update", interrupted)


@pytest.mark.parametrize("delay", [0.5, 1])
def test_ctrl_c_while_a_program_is_imported_is_one_line(delay: float) -> None:
    command = [sys.executable, "train.py", "--config", "configs/synthetic.yaml", "--print-config"]
    program = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    time.sleep(delay)
    os.killpg(program.pid, signal.SIGINT)
    assert program.communicate()[1] == b"interrupted (SIGINT)\n" and program.returncode == 130


def test_a_second_ctrl_c_ends_at_once() -> None:
    code = (
        "import time; from utils.exit import exit_on_user_error\n"
        "with exit_on_user_error():\n"
        "    try:\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaning up', flush=True); time.sleep(60)\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout and program.stdout.readline() == "ready\n"
    time.sleep(0.2)  # until print has returned
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "cleaning up\n"
    program.send_signal(signal.SIGINT)
    assert program.communicate()[1] == "interrupted (SIGINT)\n" and program.returncode == 130


@pytest.mark.parametrize("number", STOPPING)
def test_a_scheduler_gets_a_checkpoint_at_the_next_step(
    number: int, root: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    config, run = config_of("irra", root, *FAST, NEVER_SAVED), tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in_step(patch, number, step=6)
        patch.setattr(train_program, "load_config", lambda *_: config)
        status, _, error = run_program(train_program.main, monkeypatch, capsys, "--config", "x", "--run", run)
    saved = load_checkpoint(run / "last.pt")["training"]
    assert (saved["epoch"], saved["batches"], saved["step"]) == (2, 2, 6)
    last = f"resume with: python train.py --resume {run}"
    assert status == 128 + number and error == f"terminated ({signal.Signals(number).name})\n{last}\n"
    training.resume(run, [])
    straight = training.train(config, tmp_path / "straight")
    same_runs(straight, run)


def test_a_signal_in_the_last_step_saves_the_epoch_before_its_evaluation(root: Path, tmp_path: Path, monkeypatch):
    config = config_of("irra", root, "train.epochs=2", "eval.every=2", NEVER_SAVED)
    with monkeypatch.context() as patch, signals_raise(), pytest.raises(Interrupted):
        signal_in_step(patch, signal.SIGTERM, step=4)
        training.train(config, tmp_path / "run")
    saved = load_checkpoint(tmp_path / "run/last.pt")["training"]
    assert (saved["epoch"], saved["batches"], saved["trained"]) == (1, 4, True)
    training.resume(tmp_path / "run", [])
    same_runs(training.train(config, tmp_path / "straight"), tmp_path / "run")


def _signalled(config, run: Path) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as raised:
        signal_in_step(patch, signal.SIGTERM, step=1, process=1)
        training.train(config, run)
    return raised.value.status


def test_all_processes_stop_in_the_same_step(root: Path, tmp_path: Path) -> None:
    """The second process gets the signal in its first step; both learn of it in the next."""
    config = config_of("irra", root, "train.epochs=2", NEVER_SAVED)
    assert together(2, _signalled, config, tmp_path / "run") == [143, 143]
    assert load_checkpoint(tmp_path / "run/last.pt")["training"]["step"] == 2


def test_a_request_ends_with_its_body() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert request.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


class _Pids(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_a_worker_leaves_signals_to_its_parent() -> None:
    loader = data_loader(_Pids(), workers=1, timeout=10, collate_fn=lambda pids: pids)
    batches = iter(loader)
    (worker,) = next(batches)
    for name in ("INT", "TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    assert [worker for (worker,) in batches] == [worker] * 7
    batches = iter(loader)
    (worker,) = next(batches)
    os.kill(worker, signal.SIGTERM)
    assert os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT).si_status == 0
