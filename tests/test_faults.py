"""What no user can foresee: odd files of every kind, full disks, killed processes. docs/faults.md lists all of it."""

import errno
import json
import os
import re
import resource
import signal
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import processor.trainer as trainer_module
import train as train_program
from configs.schema import load_config
from datasets.annotations import ADAPTERS, load_annotations
from datasets.pairs import TrainPairs
from model.build import build_task, build_teacher, resolve
from model.checkpoints.formats import FORMATS
from model.load import load_weights
from processor.resume import go_on, last_state
from processor.trainer import Trainer
from tests.conftest import ROOT
from tests.test_command_line import run_program
from tests.test_distributed import config_of, together
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError, ConfigError, DataError
from utils.exit import fault_of_the_machine
from utils.logger import LOGGER

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# --- files that hold anything at all --------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
NAMES = st.sampled_from(["data", "model", "losses", "solver", "train", "init", "teacher", "base", "name", "sdm", "lr"])
TREES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4)
)


@FUZZ
@given(tree=TREES)
def test_any_yaml_is_a_config_or_a_clear_error(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(json.dumps(tree))  # which is YAML, too
    with pytest.raises(ConfigError) as error:  # at least, there is no encoder
        resolve(load_config(path))
    assert str(error.value)


@FUZZ
@given(content=st.binary(max_size=80) | st.text("{}[]:-#&*!|>'\"%@`, \n\tab1.", max_size=40).map(str.encode))
def test_any_bytes_are_a_config_or_a_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        resolve(load_config(path))


KEYS = ["data.batch_size", "losses.sdm", "losses.sdm.weight", "solver.lr", "model", "model.image.options", "train.ema"]


@settings(max_examples=25, deadline=None)
@given(key=st.sampled_from(KEYS) | st.text(string.printable, max_size=10), value=st.text(string.printable, max_size=12))
def test_any_override_is_taken_or_a_clear_error(key: str, value: str) -> None:
    try:
        resolve(load_config(ROOT / "configs/irra.yaml", [f"{key}={value}"]))
    except ConfigError as error:
        assert str(error)


FIELDS = st.sampled_from(["split", "id", "file_path", "img_path", "captions", "att"])
GOOD = {"split": "train", "id": 3, "file_path": "a/b.jpg", "captions": ["a man"]}
ROWS = st.lists(
    st.dictionaries(FIELDS, TREES | st.sampled_from(["train", "test", "../x", "C:\\x"]), max_size=6).map(
        lambda row: {**GOOD, **row}
    )
    | TREES,
    max_size=4,
)


@pytest.mark.parametrize("dataset", ["cuhk_pedes", "icfg_pedes", "rstpreid"])
@FUZZ
@given(rows=ROWS | TREES)
def test_any_json_is_a_data_set_or_a_clear_error(dataset: str, rows: Any, tmp_path: Path) -> None:
    folder, name = {
        "cuhk_pedes": ("CUHK-PEDES", "reid_raw.json"),
        "icfg_pedes": ("ICFG-PEDES", "ICFG-PEDES.json"),
        "rstpreid": ("RSTPReid", "data_captions.json"),
    }[dataset]
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / name).write_text(json.dumps(rows))
    assert dataset in ADAPTERS
    try:
        found = load_annotations(dataset, tmp_path, val_ids=1)
    except DataError as error:
        assert str(tmp_path) in str(error)
    else:
        assert found.train and found.test


TENSORS = st.sampled_from([torch.zeros(2), torch.ones(3, 4, dtype=torch.float16), torch.tensor(7)])
PARTS = ["model", "state_dict", "visual.conv1.weight", "module.base_model.visual.proj", "logit_scale", "encoder.a"]
STATES = st.recursive(
    PLAIN | TENSORS, lambda inner: st.dictionaries(st.sampled_from(PARTS) | st.text(max_size=4), inner, max_size=4)
)


@pytest.fixture(scope="module")
def task(root: Path) -> torch.nn.Module:
    return build_task(config_of("irra", root), 8)


@FUZZ
@given(content=STATES | st.lists(STATES, max_size=2), format=st.sampled_from([None, *FORMATS]))
def test_anything_in_a_checkpoint_is_a_clear_error(content: Any, format: str | None, task, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pt")
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises((CheckpointError, ConfigError)) as error:  # at least, weights are missing
        load_weights(task, tmp_path / "odd.pt", format=format)
    assert "odd.pt" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())


# --- checkpoints of a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_program.train(config_of("irra", root, "train.epochs=2"), tmp_path_factory.mktemp("faults") / "run")


def test_a_state_of_training_of_another_version_is_said(run: Path, monkeypatch) -> None:
    content = last_state(run)
    trainers: list[Trainer] = []
    monkeypatch.setattr(Trainer, "fit", lambda self: trainers.append(self))
    train_program.resume(run, [])
    for name in content["training"].keys() - {"average"}:  # there is none in this run
        without = {key: value for key, value in content["training"].items() if key != name}
        with pytest.raises(CheckpointError, match=r"last\.pt: its state of training is not what this version writes"):
            go_on(trainers[0], content | {"training": without})
    for name in ("epoch", "record", "optimizer", "unreadable", "processes"):
        with pytest.raises(CheckpointError, match=r"init\.path="):
            go_on(trainers[0], content | {"training": content["training"] | {name: "odd"}})


@pytest.mark.parametrize("text", ["a: [", "5", "nothing", "modle: {}", "losses: 3"])
def test_a_teacher_whose_config_cannot_be_read_is_named(text: str, root: Path, run: Path, tmp_path: Path) -> None:
    content = load_checkpoint(run / "last.pt")
    save_checkpoint(tmp_path / "teacher.pt", content | {"config": text})
    config = config_of("lcr2s", root, f"teacher.checkpoint={tmp_path / 'teacher.pt'}")
    with pytest.raises(CheckpointError, match=r"teacher\.pt: the config in it is not one of this version"):
        build_teacher(config)


def test_a_teacher_of_other_dimensions_is_said(root: Path, run: Path, tmp_path: Path) -> None:
    options = [f"teacher.checkpoint={run / 'last.pt'}", "model.embed_dim=32"]
    with pytest.raises(ConfigError, match=r"distill_features: the teacher's embeddings have 64 dimensions.* 32; "):
        train_program.train(config_of("lcr2s", root, *options), tmp_path / "run")


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """Files cannot grow beyond some bytes, which is how a full disk looks to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, small_disk) -> None:
    save_checkpoint(tmp_path / "a.pt", {"epoch": 1})
    small_disk(20_000)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written"):
        save_checkpoint(tmp_path / "a.pt", {"epoch": 2, "model": torch.randn(100_000)})
    assert load_checkpoint(tmp_path / "a.pt") == {"epoch": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_a_disk_that_fills_up_stops_training_with_one_line(
    root: Path, tmp_path: Path, small_disk, monkeypatch, capsys
) -> None:
    def filling_up(path: Path, content: dict[str, Any]) -> None:
        if content["epoch"] == 2:
            small_disk(20_000)
        save_checkpoint(path, content)

    monkeypatch.setattr(trainer_module, "save_checkpoint", filling_up)
    config = tmp_path / "config.yaml"
    config.write_text(train_program.to_yaml(config_of("irra", root, "train.epochs=3")))
    run = tmp_path / "run"
    status, _, err = run_program(train_program.main, monkeypatch, capsys, "--config", config, "--run", run)
    assert status == 1 and re.fullmatch(r"error: \S+\.pt: cannot be written \(.*\)\n", err)
    assert load_checkpoint(run / "last.pt")["epoch"] == 1
    assert not list(run.glob(".*"))


def test_a_log_that_cannot_be_written_is_no_traceback(root: Path, tmp_path: Path, small_disk, monkeypatch, capsys):
    run = tmp_path / "run"

    def fills_up(path: Path, content: dict[str, Any]) -> None:
        small_disk(10)
        LOGGER.info("which the file has no room for")

    monkeypatch.setattr(trainer_module, "save_checkpoint", fills_up)
    config = tmp_path / "config.yaml"
    config.write_text(train_program.to_yaml(config_of("irra", root)))
    status, _, err = run_program(train_program.main, monkeypatch, capsys, "--config", config, "--run", run)
    assert status == 1 and re.fullmatch(r"error: .*checkpoints that were written before are whole\n", err)


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
    assert status == 1 and err.startswith("error: a data loading process has died") and "--resume" in err
    assert "Traceback" not in err and load_checkpoint(run / "last.pt")["epoch"] == 1


def _until_killed(config: Any, run: Path) -> None:
    save = Trainer._save

    def dies(self: Trainer) -> None:
        save(self)
        if train_program.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._save = dies  # type: ignore[method-assign]  # this process is of this test alone
    try:
        train_program.train(config, run)
    except RuntimeError as error:
        raise AssertionError(f"said: {fault_of_the_machine(error)}") from None


@pytest.mark.timeout(60)
def test_a_process_that_is_killed_ends_the_others(root: Path, tmp_path: Path) -> None:
    config = config_of("irra", root, "train.epochs=3")
    with pytest.raises(AssertionError, match="said: another process has ended"):
        together(2, _until_killed, config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1
    train_program.resume(tmp_path / "run", [])  # with one process
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 3


def test_the_other_processes_let_the_first_one_speak(monkeypatch, capsys) -> None:
    """Also of what is met before they have joined."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    arguments = ["--config", ROOT / "configs/irra.yaml", "--set", "train.epoch=3"]
    for number, said in (("0", "error: train.epoch"), ("1", "error (process 1): train.epoch")):
        monkeypatch.setenv("RANK", number)
        status, _, err = run_program(train_program.main, monkeypatch, capsys, *arguments)
        assert status == 1 and err.startswith(said)
    assert waited == [5]


def test_what_is_said_of_the_machine() -> None:
    memory = fault_of_the_machine(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert memory and "Tried to allocate 2 GiB" in memory and "train.accumulate=4" in memory and "more" not in memory
    disk = fault_of_the_machine(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"))
    assert disk and disk.startswith("runs/a/metrics.jsonl: No space left on device")
    for bug in (KeyError("x"), RuntimeError("shapes"), OSError(errno.ECHILD, "no child"), RuntimeError("")):
        assert fault_of_the_machine(bug) is None
