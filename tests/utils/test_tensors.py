"""Kinds of tensors: what no model can take is refused by name, what it holds itself passes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from utils.errors import CheckpointError
from utils.tensors import check_storage, check_values

BAD_STORAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda value: value.to_sparse(),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "meta device": lambda value: value.to("meta"),
}
BAD_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "integer, float in the model": lambda value: value.to(torch.int8),
    "bool, float in the model": lambda value: value > 0,
    "complex, float in the model": lambda value: value.to(torch.complex64),
    "float8_e4m3fn, float in the model": lambda value: value.to(torch.float8_e4m3fn),
    "NaN or infinite": lambda value: value / 0,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch announces the end of its quantised tensors
@pytest.mark.parametrize("kind", BAD_STORAGE)
def test_storage_without_plain_numbers_is_refused(kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.pt: 1 tensors .*: b \(.*{kind}"):
        check_storage({"a": torch.zeros(2), "b": BAD_STORAGE[kind](torch.randn(2, 2))}, "x.pt")


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_other_kinds_of_numbers_are_refused(kind: str) -> None:
    current = {name: torch.zeros(2, 2) for name in "abcdef"}
    with pytest.raises(CheckpointError, match=rf"x\.pt: 6 tensors .*: a \({kind}\), b .* and 3 more; nothing"):
        check_values({name: BAD_VALUES[kind](torch.ones(2, 2)) for name in current}, current, "x.pt")


def test_float64_beyond_float32_is_refused() -> None:
    with pytest.raises(CheckpointError, match="infinite"):
        check_values({"a": torch.tensor([1e300], dtype=torch.float64)}, {"a": torch.zeros(1)}, "x.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_any_precision_and_integer_buffers_pass(dtype: torch.dtype) -> None:
    current = nn.BatchNorm1d(2).state_dict()  # counts its batches in an integer
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in current.items()}
    check_storage(state, "x.pt")
    check_values(state, current, "x.pt")
