"""Running average of the encoder's weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AveragedEncoder(AveragedModel):
    """An exponential moving average of a module's weights; buffers are copied.

    The values are those of torch's class, whose update makes the host wait for the GPU: it copies a counter there.

    Args:
        model: module to average.
        decay: weight of the average in each update.
    """

    n_averaged: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if self.n_averaged == 0:  # the counter is on the CPU
            torch._foreach_copy_(ours, theirs)
        else:
            self._average(ours, theirs, self.n_averaged)
        for buffer, current in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(current)
        self.n_averaged += 1
