"""Optimizer with few parameter groups, from regex rules."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from configs.schema import Rule, SolverConfig
from utils.options import check_bounds
from utils.patterns import check_pattern, matches
from utils.placement import placed_as


def parameter_settings(name: str, rules: Sequence[Rule], weight_decay: float) -> tuple[float, float]:
    """(learning-rate multiplier, weight decay) of a parameter: later rules win, key by key."""
    lr_mult = 1.0
    for number, rule in enumerate(rules):
        if matches(rule.match, name, f"solver.rules[{number}].match"):
            lr_mult = lr_mult if rule.lr_mult is None else rule.lr_mult
            weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay
    return lr_mult, weight_decay


def build_optimizer(config: SolverConfig, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
    """Adam, AdamW or SGD with one parameter group per distinct setting.

    Each group has a `base_lr`; `set_lr` sets its `lr` before each epoch. The update is fused.

    Raises:
        ConfigError: a rule is not a regular expression, or a number is out of bounds.
    """
    check_bounds(config, "solver")
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    for number, rule in enumerate(config.rules):
        check_pattern(rule.match, f"solver.rules[{number}].match")
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in named:
        groups.setdefault(parameter_settings(name, config.rules, config.weight_decay), []).append(parameter)
    settings = [
        {"params": parameters, "lr": 0.0, "base_lr": config.lr * lr_mult, "weight_decay": weight_decay}
        for (lr_mult, weight_decay), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        fused = not any(isinstance(parameter, DTensor) for _, parameter in named)  # torch has no such step for shards
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, fused=fused)
    adam: type[torch.optim.Adam] = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return adam(settings, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def load_state(optimizer: Optimizer, state: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Restore the state of the parameters; the options stay those of the config.

    Args:
        optimizer: optimizer of `build_optimizer`.
        state: number of a parameter -> its tensors, not sharded.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {number: _placed(parameters[number], tensors) for number, tensors in state.items()}
    optimizer.load_state_dict({"state": placed, "param_groups": groups})
    if state and isinstance(optimizer, torch.optim.SGD):  # its fused step takes momenta of all parameters or of none
        for parameter in parameters:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _placed(parameter: Parameter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard the tensors of a parameter's shape as the parameter is."""
    return {
        name: placed_as(parameter, value) if value.shape == parameter.shape else value
        for name, value in tensors.items()
    }


def set_lr(optimizer: Optimizer, schedule: Callable[[float], float]) -> None:
    """Set the rate of every group.

    Args:
        optimizer: optimizer of `build_optimizer`.
        schedule: base rate of a group -> rate of this epoch.
    """
    for group in optimizer.param_groups:
        group["lr"] = schedule(group["base_lr"])
