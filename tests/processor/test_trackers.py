"""Trackers: TensorBoard by default, Weights & Biases if asked for, errors before anything is trained."""

import errno
import importlib.util
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from processor import training
from processor.trackers import TRACKERS, Tracker, build_trackers, tracker_options
from tests.helpers.configs import irra_config
from tests.helpers.runs import lines_of
from utils.errors import ConfigError
from utils.faults import report_of_thread
from utils.logger import LOGGER

RECORD = {"epoch": 2, "lr": 0.5, "val": {"R1": 7.0, "mAP": 8.0}}


def test_tensorboard_has_every_number_and_the_texts(tmp_path: Path) -> None:
    (tracker,) = build_trackers(["tensorboard"], tmp_path, 1)
    tracker.log(RECORD)
    tracker.log_text("config", "a: 1")
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    values = {tag: (event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert values == {"epoch": (2, 2.0), "lr": (2, 0.5), "val/R1": (2, 7.0), "val/mAP": (2, 8.0)}
    assert events.Tags()["tensors"] == ["config/text_summary"]


class FakeRun:
    """Run of a replacement for the wandb package."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.logged, self.summary, self.finished = settings, [], {}, False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that a replacement of the wandb package has started."""
    runs: list[FakeRun] = []
    module = SimpleNamespace(init=lambda **settings: runs.append(FakeRun(**settings)) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", module)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module if name == "wandb" else find_spec(name))
    return runs


def test_wandb_gets_numbers_texts_and_a_name_that_survives_a_resume(wandb_runs: list[FakeRun], tmp_path: Path) -> None:
    for epoch in (1, 3):
        _, tracker = build_trackers(["tensorboard", {"wandb": {"project": "p", "mode": "offline"}}], tmp_path, epoch)
        tracker.log(RECORD)
        tracker.log_text("results", "a table")
        tracker.close()
    first, second = wandb_runs
    assert first.settings == second.settings
    assert first.settings["project"] == "p" and first.settings["mode"] == "offline"
    assert first.settings["resume"] == "allow" and first.settings["name"] == tmp_path.name
    assert first.logged == [({"epoch": 2, "lr": 0.5, "val/R1": 7.0, "val/mAP": 8.0}, 2)]
    assert first.summary == {"results": "a table"} and first.finished


def test_a_run_reports_to_all_its_trackers(wandb_runs: list[FakeRun], tiny: list[str], tmp_path: Path) -> None:
    config = irra_config(tiny, "train.trackers=[tensorboard, wandb]", "train.epochs=2")
    training.train(config, tmp_path / "run")
    (run,) = wandb_runs
    assert [step for _, step in run.logged] == [1, 2] and "sdm_loss" in run.logged[0][0]
    assert {"config", "results"} == set(run.summary) and run.finished
    assert list((tmp_path / "run").glob("events.*"))


def test_trackers_are_closed_if_training_fails(
    wandb_runs: list[FakeRun], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("processor.engine.backward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.train(irra_config(tiny, "train.trackers=[wandb]"), tmp_path / "run")
    assert wandb_runs[0].finished


class Broken(Tracker):
    """Tracker that fails at one of its calls."""

    def __init__(self, run: Path, epoch: int, *, at: str = "start") -> None:
        self.at = at
        self._call("start")

    def _call(self, name: str) -> None:
        if name == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def log(self, record: Any) -> None:
        self._call("log")

    def log_text(self, name: str, text: str) -> None:
        self._call("text")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("at", ["start", "text", "log", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    at: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS._components, "broken", Broken)
    config = irra_config(tiny, f"train.trackers=[tensorboard, {{broken: {{at: {at}}}}}]", "train.epochs=2")
    run = training.train(config, tmp_path / "run")
    assert len(lines_of(run)) == 2 and list(run.glob("events.*"))
    log = (run / "train.log").read_text()
    assert log.count("train.trackers: broken failed, and training continues without it (No space left on dev") == 1


def test_tensorboard_on_a_full_disk_stops_nothing(tmp_path: Path, small_disk, capsys, monkeypatch) -> None:
    monkeypatch.setattr(threading, "excepthook", report_of_thread)
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *values: said.append(text % values))
    (tracker,) = build_trackers(["tensorboard"], tmp_path, 1)
    small_disk(2000)
    for _ in range(50):
        tracker.log(RECORD)
        tracker.log_text("config", "a: 1" * 100)
    tracker.close()
    message = "train.trackers: tensorboard failed, and training continues without it (File too large)"
    assert said == [message]
    assert "Traceback" not in capsys.readouterr().err
    small_disk(0)
    assert build_trackers(["tensorboard"], tmp_path / "other", 1)  # at its start
    assert said == [message] * 2


def test_no_tracker_writes_nothing(tiny: list[str], tmp_path: Path) -> None:
    run = training.train(irra_config(tiny, "train.trackers=[]"), tmp_path / "run")
    assert not list(run.glob("events.*")) and (run / "metrics.jsonl").is_file()


def test_a_missing_package_is_said_before_training(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ConfigError, match=r"train\.trackers: wandb needs the package wandb; pip install wandb"):
        irra_config(tiny, "train.trackers=[wandb]")


@pytest.mark.parametrize(
    "trackers, message",
    [
        (["tensorbord"], r"train\.trackers: unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        (["tensorboard", "tensorboard"], r"train\.trackers: 'tensorboard' must occur once"),
        ([{"tensorboard": {"folder": "x"}}], r"train\.trackers\.tensorboard\.folder: unknown key"),
        ([{"tensorboard": 3}], r"train\.trackers\.tensorboard: options must be a mapping, got 3"),
        ([{"tensorboard": {}, "wandb": {}}], r"train\.trackers: entries must be a name or \{name: options\}"),
        ([3], r"train\.trackers: entries must be a name"),
    ],
)
def test_mistakes_name_their_path(trackers: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tracker_options(trackers)
