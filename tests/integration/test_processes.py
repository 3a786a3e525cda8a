"""Several processes train as one does: loss, gradients, runs, resumed runs, and errors that end all of them."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import Config
from datasets.annotations import load_annotations
from processor import training
from tests.helpers.configs import METHODS, ROOT, TINY, config_of
from tests.helpers.processes import together
from tests.helpers.runs import FAST, Killed, die_after, lines_of, nearly_same, same_runs
from tests.helpers.steps import exact_task, micro_batches_of, same_step, step_of
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.distributed import rank

# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_one_process(method: str, world: int, root: Path) -> None:
    size = {2: 7, 4: 10}[world]  # of 32 pairs: the last batch has 4 pairs for 2 processes, or 2 pairs for 4
    more = [f"data.batch_size={size}"] if "ivt" not in method and "joint" not in method else []
    config = config_of(method, root, *more)
    numbers = [0, -1] if config.data.sampler == "random" else [0]
    for number in numbers:
        expected, gradients, terms = step_of(config, number)
        for total, found, values in together(world, step_of, config, number):
            same_step((total, found, values), (expected, gradients, terms))


def test_token_losses_are_of_each_process_weighted_by_its_pairs(root: Path) -> None:
    config = config_of("fmfa", root, "losses.asdm=null", "losses.id=null", "losses.mlm=null", "data.batch_size=7")
    task = exact_task(config)
    ((batch, _),), expected = micro_batches_of(config, task, 0), 0.0
    for part in (slice(0, 4), slice(4, 7)):
        loss, _ = task({name: value[part] for name, value in batch.items()})
        (loss * len(batch["pids"][part]) / 7).backward()
        expected += float(loss.detach()) * len(batch["pids"][part]) / 7
    for total, found, _ in together(2, step_of, config, 0):
        assert total == pytest.approx(expected, rel=1e-10)
        for name, parameter in task.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(torch.from_numpy(found[name]), parameter.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["irra", "rde", "lcr2s_joint"])
def test_processes_that_split_their_shard_into_micro_batches(method: str, root: Path) -> None:
    """The last batch has 2 pairs for 6 micro-batches, so one process has dummy samples only."""
    more = ["data.batch_size=10"] if method != "lcr2s_joint" else []
    config = config_of(method, root, *more)
    numbers = [0, -1] if config.data.sampler == "random" else [0]
    for number in numbers:
        expected = step_of(config, number)
        for found in together(2, step_of, config_of(method, root, *more, "train.accumulate=3"), number):
            same_step(found, expected)


# --- runs -------------------------------------------------------------------------------------------------------------


def _train(config: Config, run: Path) -> None:
    training.train(config, run)


@pytest.mark.parametrize("method", ["irra", "rde"])
def test_a_run_of_two_processes_is_that_of_one(method: str, root: Path, tmp_path: Path) -> None:
    """Train for 20 steps; RDE's clean/noisy split uses the losses of all processes."""
    config = config_of(method, root, *FAST, "data.workers=0")
    training.train(config, tmp_path / "one")
    together(2, _train, config, tmp_path / "two")
    names = {path.name.split(".")[0] for path in (tmp_path / "one").iterdir()}
    assert {path.name.split(".")[0] for path in (tmp_path / "two").iterdir()} == names
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert set(one) == set(two)
        for name, value in one.items():
            if "loss" in name or "counted" in name:
                assert two[name] == pytest.approx(value, rel=2e-3), (one["epoch"], name)
    first, second = load_checkpoint(tmp_path / "two/last.pt")["training"]["processes"]
    assert not torch.equal(first["random"]["cpu"], second["random"]["cpu"])  # each process draws its own masks
    log = (tmp_path / "two/train.log").read_text()
    assert "2 processes" in log and log.count("Epoch 1 done") == 1


def _train_on_unlike_devices(config: Config, run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "device_name", lambda device: f"GPU {rank()}")
        training.train(config, run)


def test_what_one_process_cannot_read_all_know(root: Path, tmp_path: Path) -> None:
    """The same run says that the processes are on devices of different kinds, and have micro-batches without pairs."""
    shutil.copytree(root, tmp_path / "data")
    paths = sorted({record.image_path for record in load_annotations("synthetic", tmp_path / "data").train})
    for path in paths[:3]:
        Path(path).write_bytes(b"no image")
    config = config_of("irra", tmp_path / "data", "data.on_bad_image=skip", "train.accumulate=5")
    together(2, _train_on_unlike_devices, config, tmp_path / "run")
    assert [line["bad_images"] for line in lines_of(tmp_path / "run")] == [3]
    unreadable = load_checkpoint(tmp_path / "run/last.pt")["training"]["unreadable"]
    assert int(unreadable.sum()) == 6  # counted in pairs; no single process read all of them
    log = (tmp_path / "run/train.log").read_text()
    assert "the slowest sets the pace: 1 x GPU 0, 1 x GPU 1" in log
    assert "8 pairs are fewer than 10 micro-batches" in log


def _killed(config: Config, run: Path, saves: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, saves)
        try:
            training.train(config, run)
        except Killed:
            raise
        raise AssertionError("went on")


def _resume(run: Path, overrides: Sequence[str] = ()) -> None:
    training.resume(run, list(overrides))


@pytest.mark.parametrize("method, world", [("irra", 3), ("ivt", 2), ("rde", 2)])
def test_a_resumed_run_of_processes_is_the_straight_one(method: str, world: int, root: Path, tmp_path: Path) -> None:
    config = config_of(method, root, *FAST, "train.epochs=2", "train.save_every_steps=1", "eval.every=2")
    together(world, _train, config, tmp_path / "straight")
    with pytest.raises(AssertionError, match="Killed"):
        together(world, _killed, config, tmp_path / "resumed", 5)
    assert load_checkpoint(tmp_path / "resumed/last.pt")["training"]["batches"] > 0
    together(world, _resume, tmp_path / "resumed")
    same_runs(tmp_path / "straight", tmp_path / "resumed")


def test_sharding_and_the_number_of_processes_may_change_when_a_run_is_resumed(root: Path, tmp_path: Path) -> None:
    """From two processes with shards to one, and the reverse; RDE evaluates all pairs before each epoch."""
    more = ["train.save_every_steps=1", "train.ema=0.9", "train.clip_grad=1", "eval.batch_size=2"]
    config = config_of("rde", root, *FAST, "train.epochs=2", *more)
    sharded = replace(config, train=replace(config.train, shard="full"))
    training.train(config, tmp_path / "straight")
    with pytest.raises(AssertionError, match="Killed"):
        together(2, _killed, sharded, tmp_path / "gathered", 7)
    training.resume(tmp_path / "gathered", ["train.shard=none"])
    with pytest.raises(Killed):
        _killed(config, tmp_path / "split", 3)
    together(2, _resume, tmp_path / "split", ["train.shard=full"])
    expected = load_checkpoint(tmp_path / "straight/last.pt")
    for name in ("gathered", "split"):
        found = load_checkpoint(tmp_path / name / "last.pt")
        for kind in ("model", "training"):
            nearly_same(found[kind], expected[kind])
        assert set(load_checkpoint(tmp_path / name / "best_ema.pt")["model"]) <= set(expected["model"])
        for one, two in zip(lines_of(tmp_path / "straight"), lines_of(tmp_path / name), strict=True):
            assert set(one) == set(two) and two["tal_loss"] == pytest.approx(one["tal_loss"], rel=2e-3)


# --- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )


def test_the_slurm_template_trains_with_two_processes(root: Path, tmp_path: Path) -> None:
    """Run docs/slurm.sbatch with srun and scontrol replaced."""
    text, port = (ROOT / "docs/slurm.sbatch").read_text(), free_port()
    assert re.findall(r"^#SBATCH --ntasks-per-node=(\d+)", text, re.M) == ["1"] and text.count("\nsrun torchrun ") == 1
    stubs = 'srun() { "$@"; }; scontrol() { [ "$*" = "show hostnames node7" ] && echo localhost; }; . docs/slurm.sbatch'
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "node7",
        "SLURM_JOB_ID": str(port - 20_000),
    }
    arguments = ["--config", "configs/irra.yaml", "--run-folder", tmp_path / "run", "--set", *TINY, f"data.root={root}"]
    command = ["bash", "-c", stubs, "slurm.sbatch", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1


def free_port() -> int:
    """A free port of those that docs/slurm.sbatch chooses from."""
    for port in range(20_000 + os.getpid() % 10_000, 40_000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def test_an_error_of_one_process_ends_all_with_its_message(root: Path, tmp_path: Path) -> None:
    """Run torchrun: after an epoch of training, the second process reads a damaged image during evaluation."""
    data = tmp_path / "data"
    shutil.copytree(root, data)
    records = load_annotations("synthetic", data).val
    Path(records[-1].image_path).write_bytes(b"no image")  # read by the second process
    started, run = time.monotonic(), tmp_path / "run"
    done = torchrun("--config", "configs/irra.yaml", "--run-folder", run, "--set", *TINY, f"data.root={data}")
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert "2 processes" in done.stdout and done.stdout.count("Epoch 1 done") == 1
    assert f"error (process 1): {records[-1].image_path}: unreadable image" in done.stderr
    others = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all("another process ended, see its message" in line for line in others)
