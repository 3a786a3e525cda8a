"""processor/prediction.py: the predicted and the measured peak of a run, in one line after its first steps."""

import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from processor import prediction, training
from processor.random_batch import micro_batches_of, random_batch
from processor.timing import Timing
from tests.helpers.configs import config_of

ON = ("train.preflight=true", "data.batch_size=2", "train.epochs=1")


def log_of(root: Path, run: Path, *more: str) -> str:
    training.train(config_of("irra", root, *more), run)
    return (run / "train.log").read_text()


def test_one_line_after_ten_steps_says_predicted_and_measured(root: Path, tmp_path: Path) -> None:
    text = log_of(root, tmp_path / "run", *ON)
    line = r"after 10 steps: a step is \S+ TFLOP; peak memory: predicted \S+ GiB, measured (\S+) GiB \(resident, libr"
    assert len(re.findall(line, text)) == 1
    assert "predicted" not in log_of(root, tmp_path / "off", *ON[1:])  # a CPU is asked for it


def test_a_run_goes_on_without_a_prediction_and_is_not_changed_by_one(root: Path, tmp_path: Path, monkeypatch) -> None:
    texts = [log_of(root, tmp_path / "on", *ON)]

    def broken(*_: object) -> None:
        raise RuntimeError("no rule for this kernel")

    monkeypatch.setattr(prediction, "FakeStep", broken)
    texts.append(log_of(root, tmp_path / "broken", *ON))
    assert "train.preflight: a step cannot be predicted (no rule for this kernel)" in texts[1]
    losses = [re.findall(r"Iteration.*loss: (\S+),", text) for text in texts]
    assert losses[0] == losses[1] and losses[0]


def test_the_largest_batch_is_predicted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("baseline", root, "train.preflight=true")
    cpu = torch.device("cpu")
    seen = prediction.Prediction(config, cpu, Timing(config.train, cpu))
    noted: list[int] = []

    def fake_step(*_: object):
        class Step:
            cost = None

            def like(self, batch):
                noted.append(batch[0].fields["caption_ids"].shape[1])
                raise RuntimeError("enough")

        return Step()

    monkeypatch.setattr(prediction, "FakeStep", fake_step)

    class Pairs(list):  # type: ignore[type-arg]
        labels: ClassVar = {0: 0}

    for columns in (5, 9, *[7] * 10):
        batch = random_batch(config, 2, 1024, {"images", "pids", "caption_ids"}, columns=columns)
        seen.note(micro_batches_of(batch, 1), Pairs())  # type: ignore[arg-type]
    assert noted == [9]
