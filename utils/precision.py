"""Number formats of the encoder and the losses."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of `train.precision`; disabled for fp32."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


@contextlib.contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """Compute float32 matrix products with this precision: highest, high (TF32 on GPUs), or medium (bfloat16).

    None leaves it as it is.
    """
    # Compiled steps have the highest, see configs/schema.py.
    if torch.compiler.is_compiling() or name in (None, before := torch.get_float32_matmul_precision()):
        yield
        return
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def precise(values: Tensor) -> Tensor:
    """Convert to float32, the precision of losses; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
