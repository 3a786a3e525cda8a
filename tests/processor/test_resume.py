"""Resume: an interrupted run ends with the weights, optimizer, metrics and log of an uninterrupted one, bit for bit."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_program
from configs.schema import load_config
from processor import saving as saving_module
from processor import training
from processor.resolve import resolve
from processor.resume import last_state, restore
from processor.trainer import Trainer
from tests.helpers.configs import ROOT, TINY, TINY_IVT, config_of
from tests.helpers.programs import run_program
from tests.helpers.runs import Killed, die_after, same_runs
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError, ConfigError

METHODS = {
    "irra": [],
    "ivt": [],  # random masks, dropout and stochastic depth in the model
    "rde": ["data.noise_rate=0.5"],
    "lcr2s": [],  # with a teacher
    "lcr2s_joint": ["data.num_instances=2"],
}
FAST = ["train.epochs=3", "train.save_every_steps=1", "train.log_every=1", "solver.lr=1e-3", "eval.every=2"]


def overrides_of(method: str, root: Path, *more: str) -> list[str]:
    return [*(TINY_IVT if method == "ivt" else TINY), f"data.root={root}", *FAST, *METHODS[method], *more]


def train(method: str, root: Path, run: Path, *more: str) -> Path:
    return training.train(resolve(load_config(ROOT / f"configs/{method}.yaml", overrides_of(method, root, *more))), run)


def killed(method: str, root: Path, run: Path, saves: int, *more: str) -> Path:
    """Run that is killed after this number of checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, saves)
        with pytest.raises(Killed):
            train(method, root, run, *more)
    return run


@pytest.fixture(scope="module")
def teacher(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [*TINY, f"data.root={root}"]
    config = resolve(load_config(ROOT / "configs/lcr2s_teacher.yaml", overrides))
    return training.train(config, tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted run of IRRA."""
    return train("irra", root, tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_straight_one(method: str, root: Path, tmp_path: Path, teacher: Path) -> None:
    more = [f"teacher.checkpoint={teacher / 'last.pt'}"] if method == "lcr2s" else []
    straight = train(method, root, tmp_path / "straight", *more)
    resumed = killed(method, root, tmp_path / "resumed", 6, *more)  # within the second epoch
    content = load_checkpoint(resumed / "last.pt")["training"]
    assert content["epoch"] == 2 and content["batches"] > 0
    torch.manual_seed(99)  # earlier draws of the process must not matter
    training.resume(resumed, [])
    same_runs(straight, resumed)
    assert "resuming in epoch 2 after" in (resumed / "train.log").read_text()


@pytest.mark.parametrize("saves", [1, 4, 8, 9, 13])
def test_wherever_it_was_killed(saves: int, root: Path, straight: Path, tmp_path: Path) -> None:
    """Checkpoints 4 and 9 are at the ends of epochs, and checkpoints 8 and 13 are before evaluations."""
    run = killed("irra", root, tmp_path / "run", saves)
    assert training.resume(run, []) == run
    same_runs(straight, run)


def test_killed_again_and_again(root: Path, straight: Path, tmp_path: Path) -> None:
    run = killed("irra", root, tmp_path / "run", 2)
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, 2)
            with pytest.raises(Killed):
                training.resume(run, [])
    training.resume(run, [])
    same_runs(straight, run)


@pytest.mark.parametrize(
    "more, saves",
    [
        (["data.workers=2"], 5),
        (["train.save_every_steps=null"], 2),  # ends of epochs only
        (["train.accumulate=3", "data.workers=1"], 3),
        (["data.on_bad_image=skip", "train.precision=bf16"], 6),
        (["solver.optimizer=sgd", "train.save_every_steps=3", "train.ema=0.9"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_whatever_the_options(more: list[str], saves: int, root: Path, tmp_path: Path) -> None:
    whole = train("irra", root, tmp_path / "whole", *more)
    run = killed("irra", root, tmp_path / "run", saves, *more)
    training.resume(run, [])
    same_runs(whole, run)


def test_checkpoints_within_an_epoch(root: Path, tmp_path: Path) -> None:
    names, seen = [], []
    with pytest.MonkeyPatch.context() as patch:

        def save(path: Path, content: Any) -> None:
            names.append(path.stem)
            if path.name == "last.pt":
                seen.append((content["training"]["epoch"], content["training"]["batches"]))
            save_checkpoint(path, content)

        patch.setattr(saving_module, "save_checkpoint", save)
        train(
            "irra",
            root,
            tmp_path / "run",
            "train.epochs=2",
            "train.save_every_steps=3",
            "train.ema=0.9",
            "eval.every=1",
        )
    assert seen == [(1, 3), (1, 4), (2, 0), (2, 3), (2, 4), (3, 0)]  # four batches per epoch, then its evaluation
    assert names[:6] == ["last", "last", "best", "best_ema", "last", "last"]


def test_lines_of_metrics_after_the_checkpoint_go(root: Path, straight: Path, tmp_path: Path) -> None:
    run = killed("irra", root, tmp_path / "run", 4)  # before the metrics of its epoch were written
    assert not (run / "metrics.jsonl").exists()
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    training.resume(run, [])
    same_runs(straight, run)


def test_a_run_that_ended_has_nothing_left_to_do_and_may_be_made_longer(
    root: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    training.resume(run, [])
    same_runs(straight, run)
    training.resume(run, ["train.epochs=4", "train.save_every_steps=null", "train.accumulate=2"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert load_config(run / "config.yaml").train.epochs == 4


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["train.seed=2"], "train.seed: 1 -> 2"),
        (["losses.sdm.weight=2"], "losses.sdm.weight: 1.0 -> 2.0"),
        (["losses.mlm=null"], "losses.mlm.depth: 4 -> None"),
        (["solver.lr=1e-4", "train.epochs=9"], "solver.lr: 0.001 -> 0.0001"),
    ],
)
def test_another_experiment_is_refused_unless_forced(
    overrides: list[str], named: str, straight: Path, tmp_path: Path, root: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = (run / "config.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"(?s)another experiment; start a new run, or add --force.*" + re.escape(named)
    ) as error:
        training.resume(run, overrides)
    assert "train.epochs" not in str(error.value) and (run / "config.yaml").read_text() == before


def test_forced_changes_are_made(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    training.resume(run, ["losses.sdm.weight=2", "train.epochs=4"], force=True)
    assert load_config(run / "config.yaml").losses["sdm"]["weight"] == 2


def test_what_cannot_be_resumed_is_said(straight: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    whole = (run / "last.pt").read_bytes()

    def outcome(*arguments: object) -> str:
        status, _, err = run_program(train_program.main, monkeypatch, capsys, *arguments)
        assert status == 1 and "Traceback" not in err
        return err

    (run / "last.pt").write_bytes(whole[: len(whole) // 2])
    err = outcome("--resume", run)
    assert "last.pt: damaged" in err and "best.pt (epoch" in err and "init.path=" in err
    (run / "best.pt").unlink()
    assert "last.pt: damaged" in outcome("--resume", run)
    (run / "last.pt").unlink()
    assert "no such checkpoint, the run ended before its first one" in outcome("--resume", run)
    save_checkpoint(run / "last.pt", {"model": {}})
    assert "has no training state" in outcome("--resume", run)
    assert "not a run folder" in outcome("--resume", tmp_path)
    assert "--resume: continues in the run's folder; drop --run" in outcome("--resume", run, "--run", tmp_path / "b")
    assert "--force: needs --resume" in outcome("--config", ROOT / "configs/irra.yaml", "--force")


def test_the_offered_checkpoint_can_be_started_from(straight: Path, tmp_path: Path, root: Path) -> None:
    config = load_config(straight / "config.yaml", [f"init.path={straight / 'best.pt'}", "train.epochs=1"])
    assert (training.train(resolve(config), tmp_path / "run") / "last.pt").is_file()


def test_a_process_that_is_killed(root: Path, straight: Path, tmp_path: Path) -> None:
    """Kill with SIGKILL at random moments, then restart or resume until the run ends."""
    run, draw, kills = tmp_path / "run", random.Random(5), 0
    start = [sys.executable, "train.py", "--config", str(ROOT / "configs/irra.yaml"), "--run", str(run), "--set"]
    start += overrides_of("irra", root)
    while True:
        command = [sys.executable, "train.py", "--resume", str(run)] if (run / "last.pt").exists() else start
        if command is start:
            shutil.rmtree(run, ignore_errors=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills == 3:
            assert process.wait(timeout=120) == 0, process.stderr.read() if process.stderr else ""
            break
        before, deadline = stamp(run), time.monotonic() + 120
        while stamp(run) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    same_runs(straight, run)


def stamp(run: Path) -> int:
    """Modification time of last.pt, or 0 without one."""
    return (run / "last.pt").stat().st_mtime_ns if (run / "last.pt").exists() else 0


# --- state of another version -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.train(config_of("irra", root, "train.epochs=2"), tmp_path_factory.mktemp("faults") / "run")


def test_a_state_of_training_of_another_version_is_said(run: Path, monkeypatch) -> None:
    content = last_state(run)
    trainers: list[Trainer] = []
    monkeypatch.setattr(Trainer, "fit", lambda self: trainers.append(self))
    training.resume(run, [])
    for name in content["training"].keys() - {"average", "trained"}:  # no EMA here, and not saved by version 0.1
        without = {key: value for key, value in content["training"].items() if key != name}
        with pytest.raises(CheckpointError, match=r"last\.pt: its training state does not fit this version"):
            restore(trainers[0], content | {"training": without})
    for name in ("epoch", "record", "optimizer", "unreadable", "processes"):
        with pytest.raises(CheckpointError, match=r"init\.path="):
            restore(trainers[0], content | {"training": content["training"] | {name: "odd"}})
