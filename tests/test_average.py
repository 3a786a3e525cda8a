"""The running mean of the weights: what it is, that it is evaluated, saved and found again."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import test as test_program
import train as train_program
from model.build import build_task
from model.task import RetrievalTask
from processor.reporting import result_table
from processor.trainer import Trainer
from tests.test_command_line import run_program
from tests.test_distributed import config_of
from utils.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def history(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run with a mean, and the encoder's weights after each of its steps."""
    run, weights = tmp_path_factory.mktemp("average") / "run", []
    update = Trainer._update

    def recorded(self: Trainer) -> None:
        update(self)
        weights.append({name: value.clone() for name, value in self.task.encoder.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", recorded)
        more = ["train.ema=0.8", "train.epochs=3", "solver.lr=1e-3", "solver.eps=1e-6"]
        train_program.train(config_of("irra", root, *more), run)
    return run, weights


def test_it_is_the_exponential_moving_average(history: tuple[Path, list[dict[str, Tensor]]]) -> None:
    run, weights = history
    found = load_checkpoint(run / "last.pt")["training"]["average"]
    assert len(weights) == 12
    for name in weights[0]:
        expected = weights[0][name].clone()
        for step in weights[1:]:
            expected = 0.8 * expected + 0.2 * step[name] if expected.is_floating_point() else step[name]
        torch.testing.assert_close(found[f"module.{name}"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["module.text.projection.weight"], weights[-1]["text.projection.weight"])


def test_it_is_evaluated_and_saved_beside(history, monkeypatch, capsys, root: Path) -> None:
    run, _ = history
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["val_ema"]["R1"])
    content = load_checkpoint(run / "best_ema.pt")
    assert content["epoch"] == best["epoch"] and all(name.startswith("encoder.") for name in content["model"])
    status, out, err = run_program(test_program.main, monkeypatch, capsys, "--run", run, "--checkpoint", "best_ema")
    assert status == 0, err
    for metric in ("R1", "mAP", "mINP"):
        assert f"{best['test_ema'][metric]:.2f}" in out
    assert [line["test"] for line in lines] != [line["test_ema"] for line in lines]
    log = (run / "train.log").read_text()
    assert "selected on val, mean of weights (best_ema.pt)" in log and "t2i test_ema" in log


def test_training_does_not_see_it(history, root: Path, tmp_path: Path) -> None:
    _, weights = history
    plain = config_of("irra", root, "train.epochs=3", "solver.lr=1e-3", "solver.eps=1e-6")
    train_program.train(plain, tmp_path / "plain")
    for name, value in load_checkpoint(tmp_path / "plain/last.pt")["model"].items():
        if name.startswith("encoder."):
            assert torch.equal(value, weights[-1][name.removeprefix("encoder.")])
    assert not (tmp_path / "plain/best_ema.pt").exists()


def test_a_run_can_start_from_it(history, root: Path) -> None:
    run, _ = history
    config = config_of("irra", root, f"init.path={run / 'best_ema.pt'}")
    task = build_task(config, 8)
    report = train_program.load_init(task, config.init)
    assert report is not None and isinstance(task, RetrievalTask)
    mean = load_checkpoint(run / "best_ema.pt")["model"]
    assert torch.equal(task.state_dict()["encoder.text.projection.weight"], mean["encoder.text.projection.weight"])


def test_the_table_has_its_rows_only_where_it_is() -> None:
    numbers = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "mAP": 4.0, "mINP": 5.0}
    plain = {"epoch": 1, "val": numbers, "test": numbers}
    assert "mean of weights" not in result_table([plain], "val")
    both = result_table([plain | {"val_ema": numbers, "test_ema": {**numbers, "R1": 9.0}}], "test")
    assert both.count("mean of weights") == 3 and "best on test, mean of weights (best_ema.pt)" in both
    assert both.count("9.00") == 3
