"""Learning-rate schedules: the authors' values, and landmarks."""

import math

import numpy as np
import pytest

from configs.schema import load_config
from processor.resolve import resolve
from solver.schedule import SCHEDULES, Progress, lr_at, schedule_notes, schedule_options
from tests.helpers.configs import GOLDEN, ROOT
from utils.errors import ConfigError


@pytest.mark.parametrize("name", ["cosine", "step", "exp", "poly", "linear"])
def test_schedules_are_the_authors(name: str, irra_golden: dict[str, np.ndarray]) -> None:
    expected = irra_golden[f"lr/{name}_w5_e60"]
    for epoch, row in enumerate(expected, start=1):
        rates = [lr_at(epoch, base, name=name, epochs=60, warmup_epochs=5) for base in (1e-5, 5e-5, 2e-5)]
        np.testing.assert_allclose(rates, row, rtol=1e-9)
    assert len(expected) == 60


def test_constant_warmup_is_the_authors(irra_golden: dict[str, np.ndarray]) -> None:
    for epoch, row in enumerate(irra_golden["lr/cosine_constwarm_e60"], start=1):
        rate = lr_at(epoch, 1e-5, name="cosine", epochs=60, warmup_epochs=5, warmup="constant")
        np.testing.assert_allclose(rate, row[0], rtol=1e-9)


def test_the_cosine_of_ivt_is_the_authors_for_both_groups() -> None:
    golden = np.load(GOLDEN / "ivt_lr.npz")
    options = {"name": "timm_cosine", "epochs": 120, "warmup_epochs": 5, "warmup_lr": 5e-5, "min_lr": 1e-5}
    for name, base in (("lr_weight", 0.005), ("lr_bias", 0.01)):
        rates = [lr_at(int(epoch), base, **options) for epoch in golden["epoch"]]
        np.testing.assert_allclose(rates, golden[name], rtol=1e-9)
    schedule = load_config(ROOT / "configs/ivt.yaml").solver.schedule
    assert {**schedule_options(schedule), "epochs": 120} == options


def test_schedule_landmarks() -> None:
    options = {"name": "cosine", "epochs": 30, "min_lr": 0.1}
    assert lr_at(1, 1.0, **options) == 1.0  # no warm-up: starts at the base rate
    assert lr_at(16, 1.0, **options) == pytest.approx(0.55)  # halfway between base and minimum rate
    assert lr_at(30, 1.0, **options) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 29 / 30)))
    assert {lr_at(epoch, 0.3, name="constant", epochs=9) for epoch in range(1, 10)} == {0.3}
    assert lr_at(3, 1.0, name="cosine", epochs=3, warmup_epochs=3) == pytest.approx(0.1 / 3 + 2 / 3)  # only warm-up


def test_options_are_those_of_the_schedule() -> None:
    assert schedule_options({}) == schedule_options({"name": "cosine"})
    assert schedule_options({"name": "step", "milestones": [3]})["milestones"] == [3]
    for options, message in (
        ({"name": "cosin"}, r"solver\.schedule\.name: unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"name": 3}, r"solver\.schedule\.name: must be set, got 3; choose from"),
        ({"gamma": 0.1}, r"solver\.schedule\.gamma: cosine has no such option \(null drops an inherited one\)"),
        ({"name": "step", "gamma": -1}, r"solver\.schedule\.gamma: must be above 0 and at most 1, got -1\.0"),
        ({"name": "exp", "power": -2}, r"solver\.schedule\.power: must be above 0 and at most 1, got -2\.0"),
        ({"warmup_factor": math.nan}, r"solver\.schedule\.warmup_factor: must be a finite number, got nan"),
        ({"warmup": "slow"}, r"solver\.schedule\.warmup: .*slow"),
    ):
        with pytest.raises(ConfigError, match=message):
            schedule_options(options)
    assert schedule_options({"name": "timm_cosine", "warmup_factor": None}) == schedule_options({"name": "timm_cosine"})


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["schedule.min_lr=1"], r"min_lr: must be at most 1e-05, the smallest rate of .*, got 1; lower it"),
        (
            ["schedule={name: timm_cosine, warmup_lr: 2e-5, warmup_factor: null, warmup: null}"],
            r"warmup_lr: must be at most 1e-05, .*, got 2e-05",
        ),
        (["rules=[{match: x, lr_mult: 0.1}]", "schedule.min_lr=5e-6"], r"min_lr: must be at most 1e-06"),
    ],
)
def test_no_schedule_leads_above_the_rate_of_a_group(overrides: list[str], message: str) -> None:
    config = load_config(ROOT / "configs/irra.yaml", [f"solver.{override}" for override in overrides])
    with pytest.raises(ConfigError, match=r"solver\.schedule\." + message):
        resolve(config)


def test_a_warm_up_of_all_epochs_is_remarked_on() -> None:
    for name in ("cosine", "timm_cosine"):
        schedule = schedule_options({"name": name, "warmup_epochs": 3})
        assert schedule_notes(schedule, 4) == []
        (note,) = schedule_notes(schedule, 3)
        assert "solver.schedule.warmup_epochs (3) is at least train.epochs (3)" in note


@pytest.mark.parametrize("rate", [-1.0, math.inf, math.nan])
def test_a_schedule_from_outside_gives_a_rate(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES._components, "odd", lambda progress, base_lr: rate)
    with pytest.raises(ConfigError, match=rf"odd must give a rate of at least 0, got {rate} in epoch 2"):
        lr_at(2, 1.0, name="odd", epochs=3)


def test_a_schedule_from_outside_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def halving(progress: Progress, base_lr: float, *, every: int = 1) -> float:
        return base_lr * 0.5 ** ((progress.epoch - 1) // every)

    monkeypatch.setitem(SCHEDULES._components, "halving", halving)
    schedule = schedule_options({"name": "halving", "every": 2})
    assert [lr_at(epoch, 8.0, epochs=9, **schedule) for epoch in (1, 2, 3, 5)] == [8, 8, 4, 2]
