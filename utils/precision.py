"""In which number format the encoder and the losses compute."""

import torch
from torch import Tensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of `train.precision`; fp32 is none."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def precise(values: Tensor) -> Tensor:
    """As float32, or as float64 where it is that already: what losses are computed in."""
    return values if values.dtype == torch.float64 else values.float()
