"""Learning rates against the authors' schedules; rules -> few groups; every optimizer steps."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from configs.schema import Rule, SolverConfig, load_config
from model.build import build_task
from solver.optimizer import build_optimizer, parameter_settings, set_lr
from solver.schedule import lr_at
from tests.conftest import GOLDEN, ROOT, TINY
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
    assert {**asdict(schedule), "epochs": 120}.items() >= options.items()


def test_schedule_landmarks() -> None:
    options = {"name": "cosine", "epochs": 30, "min_lr": 0.1}
    assert lr_at(1, 1.0, **options) == 1.0  # no warm-up: begins at the top
    assert lr_at(16, 1.0, **options) == pytest.approx(0.55)  # half way between top and floor
    assert lr_at(30, 1.0, **options) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 29 / 30)))
    assert {lr_at(epoch, 0.3, name="constant", epochs=9) for epoch in range(1, 10)} == {0.3}
    assert lr_at(3, 1.0, name="cosine", epochs=3, warmup_epochs=3) == pytest.approx(0.1 / 3 + 2 / 3)  # only warm-up


def test_later_rules_win_key_by_key() -> None:
    rules = [Rule(r"\bcross", lr_mult=5), Rule("bias$", lr_mult=2, weight_decay=0), Rule("head", lr_mult=7)]
    assert parameter_settings("a.cross.weight", rules, 0.1) == (5, 0.1)
    assert parameter_settings("a.cross.bias", rules, 0.1) == (2, 0)
    assert parameter_settings("head.bias", rules, 0.1) == (7, 0)
    assert parameter_settings("across.weight", rules, 0.1) == (1, 0.1)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_equal_settings_share_a_group_and_all_of_them_step(name: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    config = SolverConfig(optimizer=name, lr=0.1, weight_decay=0.01, rules=[Rule("bias$", lr_mult=2, weight_decay=0)])  # type: ignore[arg-type]
    optimizer = build_optimizer(config, model.named_parameters())
    assert sorted(
        (group["base_lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups
    ) == [
        (0.1, 0.01, 5),
        (0.2, 0, 5),
    ]
    set_lr(optimizer, lambda base_lr: base_lr / 2)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.05, 0.1]
    before = [parameter.clone() for parameter in model.parameters()]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_update_is_fused(name: str) -> None:
    config = SolverConfig(optimizer=name)  # type: ignore[arg-type]
    assert build_optimizer(config, nn.Linear(2, 2).named_parameters()).defaults["fused"] is True


@pytest.mark.parametrize("options", [{"betas": (2.0, 0.9)}, {"eps": -1.0}])
def test_numbers_out_of_bounds_are_the_users_to_mend(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"solver: Invalid"):
        build_optimizer(SolverConfig(**options), nn.Linear(2, 2).named_parameters())


@pytest.mark.parametrize("rule", [Rule("weight", lr_mult=-1), Rule("weight", weight_decay=-0.1)])
def test_a_negative_rule_is_named(rule: Rule) -> None:
    with pytest.raises(ConfigError, match=r"solver\.rules\[0\]: .* must not be negative"):
        build_optimizer(SolverConfig(rules=[rule]), nn.Linear(2, 2).named_parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(SolverConfig(), model.named_parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(ConfigError, match=r"solver\.rules\[1\]\.match.*'\('"):
        build_optimizer(SolverConfig(rules=[Rule("x"), Rule("(")]), nn.Linear(2, 2).named_parameters())


def test_the_groups_of_rde_are_the_authors() -> None:
    """RDE spec 6: CLIP 1e-5, its biases 2e-5 without decay; token selection 1e-3, decay on weights only."""
    config = load_config(ROOT / "configs/rde.yaml", TINY)
    task = build_task(config, num_pids=4)
    groups = build_optimizer(config.solver, task.named_parameters()).param_groups
    settings = {(round(group["base_lr"], 9), group["weight_decay"]): group["params"] for group in groups}
    assert set(settings) == {(1e-5, 4e-5), (2e-5, 0), (1e-3, 4e-5), (1e-3, 0)}
    places = {id(parameter): setting for setting, parameters in settings.items() for parameter in parameters}
    for name, parameter in task.named_parameters():
        selection, bias = name.startswith("encoder.selection."), name.endswith("bias")
        expected = (1e-3 if selection else 2e-5 if bias else 1e-5, 0 if bias else 4e-5)
        assert places[id(parameter)] == expected, name
    solver = config.solver
    assert (solver.optimizer, solver.eps, tuple(solver.betas)) == ("adam", 1e-3, (0.9, 0.999))
    schedule = {**asdict(solver.schedule), "epochs": load_config(ROOT / "configs/rde.yaml").train.epochs}
    factors = [lr_at(epoch, 1.0, **schedule) for epoch in (1, 2, 3, 4, 5, 6, 60)]
    np.testing.assert_allclose(factors, [0.1, 0.28, 0.46, 0.64, 0.82, 1.0, 0.000815], rtol=1e-3)
