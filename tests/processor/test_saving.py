"""Checkpoints of a run: the files that train.keep asks for, their precision, and the refusal of what is not finite."""

from pathlib import Path

import pytest
import torch

from model.objectives.matching import SDM
from processor import training
from processor.saving import floating
from processor.trainer import Trainer
from tests.helpers.configs import config_of
from tests.helpers.programs import evaluate
from utils.checkpoint import load_checkpoint
from utils.errors import ConfigError, TrainingError
from utils.metrics import METRICS


@pytest.mark.parametrize(
    "keep, names",
    [
        ("last", ["last.pt"]),
        ("best", ["best.pt", "last.pt"]),
        ("all", ["best.pt", "epoch_001.pt", "epoch_002.pt", "last.pt"]),
    ],
)
def test_the_weights_that_are_kept(keep: str, names: list[str], root: Path, tmp_path: Path) -> None:
    run = training.train(config_of("irra", root, "train.epochs=2", f"train.keep={keep}"), tmp_path / "run")
    assert sorted(path.name for path in run.glob("*.pt")) == names
    if keep == "all":
        last = load_checkpoint(run / "last.pt")["model"]
        assert all(
            torch.equal(value, last[name]) for name, value in load_checkpoint(run / "epoch_002.pt")["model"].items()
        )


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_best_weights_in_half_precision(precision: str, dtype: torch.dtype, root: Path, tmp_path: Path) -> None:
    run = training.train(config_of("irra", root, f"train.save_precision={precision}"), tmp_path / "run")
    best, last = load_checkpoint(run / "best.pt")["model"], load_checkpoint(run / "last.pt")["model"]
    for name, value in last.items():
        assert torch.equal(best[name], value.to(dtype) if value.is_floating_point() else value)
    assert (run / "best.pt").stat().st_size < 0.6 * sum(value.nbytes for value in last.values())
    assert set(evaluate("--run", run)) == {"t2i"}


def test_a_weight_that_would_overflow_stays_in_full_precision(root: Path, tmp_path: Path, monkeypatch) -> None:
    save = Trainer._save

    def with_a_large_weight(self: Trainer) -> None:
        with torch.no_grad():
            next(self.task.parameters()).view(-1)[0] = 1e30
        save(self)

    monkeypatch.setattr(Trainer, "_save", with_a_large_weight)
    monkeypatch.setattr(
        Trainer, "_evaluate", lambda self, epoch: {"val": {"R1": 1.0}, "test": dict.fromkeys(METRICS, 1.0)}
    )
    config = config_of("irra", root, "train.save_precision=fp16")
    best = load_checkpoint(training.train(config, tmp_path / "run") / "best.pt")["model"]
    assert {value.dtype for value in best.values()} >= {torch.float16, torch.float32}
    assert all(value.isfinite().all() for value in best.values() if value.is_floating_point())


@pytest.mark.parametrize("place", ["weights", "optimizer"])
def test_last_is_never_overwritten_by_what_is_not_finite(place: str, root: Path, tmp_path: Path, monkeypatch) -> None:
    save, before = Trainer._save, []

    def broken(self: Trainer) -> None:
        if self.epoch == 2 and self.batches == 0:
            before.append((self.run / "last.pt").read_bytes())
            with torch.no_grad():
                parameter = next(self.task.parameters())
                state = self.engine.optimizer.state[parameter]
                (parameter if place == "weights" else state["exp_avg_sq"]).view(-1)[0] = float("inf")
        save(self)

    monkeypatch.setattr(Trainer, "_save", broken)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"1 of \d+ tensors of the model and its optimizer are not finite"):
        training.train(config_of("irra", root, "train.epochs=2"), run)
    assert (run / "last.pt").read_bytes() == before[0]


def test_a_loss_that_is_only_logged_may_be_nan(root: Path, tmp_path: Path, monkeypatch) -> None:
    forward = SDM.forward
    monkeypatch.setattr(SDM, "forward", lambda self, step: (forward(self, step)[0] * float("nan"), {}))
    run = training.train(config_of("irra", root, "losses.sdm.weight=0"), tmp_path / "run")
    assert load_checkpoint(run / "last.pt")["epoch"] == 1


def test_tensors_are_found_at_any_depth() -> None:
    value = {"a": torch.ones(1), "b": [{"c": torch.ones(2)}, (torch.ones(3), 5)], "n": torch.ones(1, dtype=torch.int64)}
    assert [name for name, _ in floating(value)] == ["a", "b.0.c", "b.1.0"]


def test_losses_that_train_nothing_are_refused(root: Path) -> None:
    zero = [f"losses.{name}.weight=0" for name in ("sdm", "id", "mlm")]
    with pytest.raises(ConfigError, match=r"losses: nothing would be trained, because the weight of .* is 0"):
        config_of("irra", root, *zero)
    config_of("irra", root, *zero[1:])
