"""Kinds of tensors that a model cannot take: sparse, quantised, of another number type, or not finite."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import CheckpointError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_storage(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise `CheckpointError` for tensors that do not hold one plain number per element."""
    _refuse(source, ((name, found) for name, value in state.items() if (found := _storage(value))))


def check_values(state: Mapping[str, Tensor], current: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise `CheckpointError` for tensors of another kind of number than the model's, or not finite.

    Args:
        state: name -> tensor, to be copied into the model.
        current: state dict of the model, with all names of `state`.
        source: path of the file, for error messages.
    """
    _refuse(source, ((name, found) for name, value in state.items() if (found := _misfit(value, current[name]))))


def _storage(value: Tensor) -> str | None:
    if value.is_quantized:
        return "quantised"
    if value.layout != torch.strided or value.is_nested:
        return "nested" if value.is_nested else "sparse"
    return "without values (meta device)" if value.is_meta else None


def _misfit(value: Tensor, current: Tensor) -> str | None:
    kind, wanted = _kind(value), _kind(current)
    if kind != wanted:
        return f"{kind}, {wanted} in the model"
    if value.is_floating_point() and not value.is_meta and not value.to(current.dtype).isfinite().all():
        return "NaN or infinite"
    return None


def _kind(value: Tensor) -> str:
    if value.dtype in FLOATS:
        return "float"
    if value.is_complex() or value.dtype == torch.bool:
        return "complex" if value.is_complex() else "bool"
    if value.is_floating_point():  # 8 bits and less need a scale that lies elsewhere
        return str(value.dtype).removeprefix("torch.")
    return "integer"


def _refuse(source: str | Path, found: Iterable[tuple[str, str]], most: int = 3) -> None:
    bad = [f"{name} ({what})" for name, what in found]
    if bad:
        more = f" and {len(bad) - most} more" if len(bad) > most else ""
        raise CheckpointError(
            f"{source}: {len(bad)} tensors are of a kind that cannot be loaded: {', '.join(bad[:most])}{more}; "
            "nothing was loaded; use an earlier checkpoint, or save dense float32 weights"
        )
