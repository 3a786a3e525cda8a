"""Number formats of the encoder and the losses."""

import torch
from torch import Tensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of `train.precision`; disabled for fp32."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def precise(values: Tensor) -> Tensor:
    """Convert to float32, the precision of losses; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
