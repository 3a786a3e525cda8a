"""Exponential moving average of weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.placement import local, placed_as

PREFIX = "module."  # as torch's AveragedModel names its weights


class MovingAverage:
    """Exponential moving average of the parameters of a module. The buffers of the average are those of the module.

    Args:
        module: module that is trained; its parameters may be sharded.
        decay: weight of the average in each update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.number = module, 0  # of updates
        self._average = get_ema_multi_avg_fn(decay)
        self._values = {parameter: parameter.detach().clone() for parameter in module.parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Include the current parameters; the first ones are the average at first."""
        values, parameters = [local(value) for value in self._values.values()], [local(one) for one in self._values]
        if self.number == 0:
            torch._foreach_copy_(values, parameters)
        else:
            self._average(values, parameters, self.number)
        self.number += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the parameters during the body."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in self._values.items():
            current = local(parameter).clone()
            local(parameter).copy_(local(value))
            local(value).copy_(current)

    def weights(self) -> dict[str, Tensor]:
        """State dict of the module with averaged parameters."""
        named = self.module.named_parameters(remove_duplicate=False)
        averaged = {name: self._values[parameter] for name, parameter in named}
        return {name: averaged.get(name, value) for name, value in self.module.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {"n_averaged": torch.tensor(self.number)} | {
            PREFIX + name: value for name, value in self.weights().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.number = int(state["n_averaged"])
        for name, parameter in self.module.named_parameters():
            self._values[parameter].copy_(placed_as(parameter, state[PREFIX + name]))
