"""Optimizers: rules make a few parameter groups, every group is updated, bad settings are named."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Rule, SolverConfig
from solver.optimizer import build_optimizer, load_state, parameter_settings, set_lr
from tests.helpers.configs import tiny_config
from tests.helpers.tasks import task_of
from utils.errors import ConfigError


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
    with pytest.raises(ConfigError, match=r"solver\.(betas|eps): must be (at least|above) 0"):
        build_optimizer(SolverConfig(**options), nn.Linear(2, 2).named_parameters())


@pytest.mark.parametrize("rule", [Rule("weight", lr_mult=-1), Rule("weight", weight_decay=-0.1)])
def test_a_negative_rule_is_named(rule: Rule) -> None:
    with pytest.raises(ConfigError, match=r"solver\.rules\[0\]\.(lr_mult|weight_decay): must be at least 0"):
        build_optimizer(SolverConfig(rules=[rule]), nn.Linear(2, 2).named_parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(SolverConfig(), model.named_parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(ConfigError, match=r"solver\.rules\[1\]\.match.*'\('"):
        build_optimizer(SolverConfig(rules=[Rule("x"), Rule("(")]), nn.Linear(2, 2).named_parameters())


def test_rate_groups_of_the_fusion(root: Path) -> None:
    for name in ("lcr2s_teacher", "lcr2s_joint"):
        config = tiny_config(name, root)
        task = task_of(config)
        groups = build_optimizer(config.solver, task.named_parameters()).param_groups
        rates: dict[int, float] = {id(p): group["base_lr"] for group in groups for p in group["params"]}
        fusion: Tensor = task.encoder.fusion["image"].out.weight  # type: ignore[index, union-attr, assignment]
        assert rates[id(fusion)] == pytest.approx(5e-5)


def test_sgd_resumes_with_momenta_of_some_parameters() -> None:
    """Fused SGD takes momenta of all parameters or of none."""
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(SolverConfig(optimizer="sgd"), model.named_parameters())
    load_state(optimizer, {0: {"momentum_buffer": torch.ones(2, 2)}})
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.state[model.bias]["momentum_buffer"], model.bias.grad)


def test_momenta_are_defined_after_a_first_update_that_overflowed() -> None:
    parameter = nn.Parameter(torch.ones(1000))
    optimizer = build_optimizer(SolverConfig(optimizer="sgd", momentum=0.9), [("weight", parameter)])
    set_lr(optimizer, lambda base_lr: 1.0)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.zeros(1000))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]  # as GradScaler does
    parameter.grad = torch.full((1000,), torch.inf)
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    parameter.grad = torch.ones(1000)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.zeros(1000))
