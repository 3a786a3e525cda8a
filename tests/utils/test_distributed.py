"""Devices and processes: averaging of gradients, more processes than GPUs."""

import sys
from typing import Any

import pytest
import torch

from tests.helpers.processes import together
from utils import distributed
from utils.distributed import average_gradients, peak_memory, rank, start_processes
from utils.errors import ConfigError


def _averaged() -> list[Any]:
    module = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(2, 1).double(), torch.nn.Linear(4, 4)])
    for place, parameter in enumerate(module.parameters()):
        if place < 4:  # the last layer is unused
            parameter.grad = torch.full_like(parameter, float(rank() + place))
    average_gradients(module.parameters())
    return [None if parameter.grad is None else parameter.grad.unique().tolist() for parameter in module.parameters()]


def test_gradients_are_averaged() -> None:
    assert together(2, _averaged) == [[[0.5], [1.5], [2.5], [3.5], None, None]] * 2


def test_without_unix_the_peak_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peak_memory(torch.device("cpu")) or 0) > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"torchrun --nproc_per_node: this machine has 2 GPUs, got 4 processes"):
        start_processes()


def test_alone_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 3)
    with distributed.alone():
        assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert (distributed.world_size(), distributed.rank()) == (4, 3)
