"""Regex rules -> few parameter groups -> an optimizer."""

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from configs.schema import Rule, SolverConfig
from utils.errors import ConfigError


def parameter_settings(name: str, rules: Sequence[Rule], weight_decay: float) -> tuple[float, float]:
    """(learning-rate multiplier, weight decay) of the parameter `name`: later rules win, key by key."""
    lr_mult = 1.0
    for rule in rules:
        if re.search(rule.match, name):
            lr_mult = lr_mult if rule.lr_mult is None else rule.lr_mult
            weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
    return lr_mult, weight_decay


def build_optimizer(config: SolverConfig, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
    """Adam, AdamW or SGD over one parameter group per distinct setting, each with its `base_lr`.

    The groups' `lr` is to be set before each epoch (`set_lr`). The update is fused: one pass over all parameters.

    Raises:
        ConfigError: a rule that is no regular expression, or a number the optimizer has no use for.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    _check_rules(config.rules)
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in named:
        groups.setdefault(parameter_settings(name, config.rules, config.weight_decay), []).append(parameter)
    settings = [
        {"params": parameters, "lr": 0.0, "base_lr": config.lr * lr_mult, "weight_decay": weight_decay}
        for (lr_mult, weight_decay), parameters in groups.items()
    ]
    try:
        if config.optimizer == "sgd":
            return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, fused=True)
        adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        return adam(settings, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)
    except ValueError as error:  # torch knows the bounds of each number
        raise ConfigError(f"solver: {error}") from None


def set_lr(optimizer: Optimizer, rate: Callable[[float], float]) -> None:
    """Give every group the scheduled `rate` of its own base rate (solver.lr times its rules' multiplier)."""
    for group in optimizer.param_groups:
        group["lr"] = rate(group["base_lr"])


def _check_rules(rules: Sequence[Rule]) -> None:
    for number, rule in enumerate(rules):
        where = f"solver.rules[{number}]"
        try:
            re.compile(rule.match)
        except re.error as error:
            raise ConfigError(f"{where}.match: '{rule.match}' is no regular expression ({error})") from None
        if min(rule.lr_mult or 0, rule.weight_decay or 0) < 0:
            raise ConfigError(f"{where}: lr_mult and weight_decay must not be negative")
