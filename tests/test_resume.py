"""A run that is killed and resumed ends as one that was not: weights, optimizer, metrics and logs, bit for bit."""

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
from torch import Tensor

import train as train_program
from configs.schema import load_config
from model.build import resolve
from processor import trainer as trainer_module
from tests.conftest import ROOT, TINY, TINY_IVT
from tests.test_command_line import run_program
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import ConfigError

TIMING = ("seconds", "samples_per_second", "peak_memory_gib")
METHODS = {
    "irra": [],
    "ivt": [],  # draws from the model's generator: masks, dropout, stochastic depth
    "rde": ["data.noise_rate=0.5"],
    "lcr2s": [],  # with a teacher
    "lcr2s_joint": ["data.num_instances=2"],
}
FAST = ["train.epochs=3", "train.save_every_steps=1", "train.log_every=1", "solver.lr=1e-3", "eval.every=2"]


class Killed(BaseException):
    """In place of a signal, where a test stays in one process."""


def overrides_of(method: str, root: Path, *more: str) -> list[str]:
    return [*(TINY_IVT if method == "ivt" else TINY), f"data.root={root}", *FAST, *METHODS[method], *more]


def train(method: str, root: Path, run: Path, *more: str) -> Path:
    return train_program.train(
        resolve(load_config(ROOT / f"configs/{method}.yaml", overrides_of(method, root, *more))), run
    )


def die_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Raise `Killed` when so many checkpoints have been written."""
    count = iter(range(1, 10**6))

    def save(path: Path, content: Any) -> None:
        save_checkpoint(path, content)
        if Path(path).name == "last.pt" and next(count) == saves:
            raise Killed

    monkeypatch.setattr(trainer_module, "save_checkpoint", save)


def same(a: Any, b: Any, path: str = "") -> None:
    """Equal to the last bit, but for times."""
    if isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            if key not in TIMING:
                same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{number}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def same_runs(straight: Path, resumed: Path) -> None:
    names = sorted(path.name for path in straight.glob("*.pt"))
    assert names == sorted(path.name for path in resumed.glob("*.pt"))
    for name in names:
        same(load_checkpoint(straight / name), load_checkpoint(resumed / name), name)
    same(
        *(
            [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (straight, resumed)
        )
    )
    same(*(training_lines(run) for run in (straight, resumed)))


def training_lines(run: Path) -> list[str]:
    """What the log says of steps and evaluations, each once, without times."""
    lines = re.findall(r"Epoch\[\d+\].*|\| t2i .*|best R1.*", (run / "train.log").read_text())
    return list(dict.fromkeys(lines))


def killed(method: str, root: Path, run: Path, saves: int, *more: str) -> Path:
    """A run that ended with its n-th checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, saves)
        with pytest.raises(Killed):
            train(method, root, run, *more)
    return run


@pytest.fixture(scope="module")
def teacher(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [*TINY, f"data.root={root}"]
    config = resolve(load_config(ROOT / "configs/lcr2s_teacher.yaml", overrides))
    return train_program.train(config, tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of IRRA."""
    return train("irra", root, tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_straight_one(method: str, root: Path, tmp_path: Path, teacher: Path) -> None:
    more = [f"teacher.checkpoint={teacher / 'last.pt'}"] if method == "lcr2s" else []
    straight = train(method, root, tmp_path / "straight", *more)
    resumed = killed(method, root, tmp_path / "resumed", 6, *more)  # within the second epoch
    content = load_checkpoint(resumed / "last.pt")["training"]
    assert content["epoch"] == 2 and content["batches"] > 0
    torch.manual_seed(99)  # whatever the process has drawn before
    train_program.resume(resumed, [])
    same_runs(straight, resumed)
    assert "going on with epoch 2 after" in (resumed / "train.log").read_text()


@pytest.mark.parametrize("saves", [1, 4, 8, 11])
def test_wherever_it_was_killed(saves: int, root: Path, straight: Path, tmp_path: Path) -> None:
    """4 and 8 are the ends of epochs."""
    run = killed("irra", root, tmp_path / "run", saves)
    assert train_program.resume(run, []) == run
    same_runs(straight, run)


def test_killed_again_and_again(root: Path, straight: Path, tmp_path: Path) -> None:
    run = killed("irra", root, tmp_path / "run", 2)
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, 2)
            with pytest.raises(Killed):
                train_program.resume(run, [])
    train_program.resume(run, [])
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
    train_program.resume(run, [])
    same_runs(whole, run)


def test_checkpoints_within_an_epoch(root: Path, tmp_path: Path) -> None:
    names, seen = [], []
    with pytest.MonkeyPatch.context() as patch:

        def save(path: Path, content: Any) -> None:
            names.append(path.stem)
            if path.name == "last.pt":
                seen.append((content["training"]["epoch"], content["training"]["batches"]))
            save_checkpoint(path, content)

        patch.setattr(trainer_module, "save_checkpoint", save)
        train(
            "irra",
            root,
            tmp_path / "run",
            "train.epochs=2",
            "train.save_every_steps=3",
            "train.ema=0.9",
            "eval.every=1",
        )
    assert seen == [(1, 3), (2, 0), (2, 3), (3, 0)]  # four batches an epoch
    assert names[:5] == ["last", "best", "best_ema", "last", "last"]


def test_lines_of_metrics_after_the_checkpoint_go(root: Path, straight: Path, tmp_path: Path) -> None:
    run = killed("irra", root, tmp_path / "run", 4)  # before the line of its epoch was written
    assert not (run / "metrics.jsonl").exists()
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    train_program.resume(run, [])
    same_runs(straight, run)


def test_a_run_that_ended_has_nothing_left_to_do_and_may_be_made_longer(
    root: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    train_program.resume(run, [])
    same_runs(straight, run)
    train_program.resume(run, ["train.epochs=4", "train.save_every_steps=null", "train.accumulate=2"])
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
        ConfigError, match=r"(?s)another experiment \(--force does so all the same\).*" + re.escape(named)
    ) as error:
        train_program.resume(run, overrides)
    assert "train.epochs" not in str(error.value) and (run / "config.yaml").read_text() == before


def test_forced_changes_are_made(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    train_program.resume(run, ["losses.sdm.weight=2", "train.epochs=4"], force=True)
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
    assert "last.pt: damaged" in err and "best.pt, epoch" in err and "init.path=" in err
    (run / "best.pt").unlink()
    assert "last.pt: damaged" in outcome("--resume", run)
    (run / "last.pt").unlink()
    assert "no such checkpoint; the run ended before its first one" in outcome("--resume", run)
    save_checkpoint(run / "last.pt", {"model": {}})
    assert "holds no state of training" in outcome("--resume", run)
    assert "no run folder" in outcome("--resume", tmp_path)
    assert "--run, --print-config: belong to --config" in outcome("--resume", run, "--run", tmp_path / "b")
    assert "--force: belongs to --resume" in outcome("--config", ROOT / "configs/irra.yaml", "--force")


def test_the_offered_checkpoint_can_be_started_from(straight: Path, tmp_path: Path, root: Path) -> None:
    config = load_config(straight / "config.yaml", [f"init.path={straight / 'best.pt'}", "train.epochs=1"])
    assert (train_program.train(resolve(config), tmp_path / "run") / "last.pt").is_file()


def test_a_process_that_is_killed(root: Path, straight: Path, tmp_path: Path) -> None:
    """With SIGKILL, at any moment: it starts anew, or goes on, until it has ended."""
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
    """Of the last checkpoint."""
    return (run / "last.pt").stat().st_mtime_ns if (run / "last.pt").exists() else 0
