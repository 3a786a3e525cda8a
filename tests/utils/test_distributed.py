"""Devices and processes: peak memory, GPUs of different kinds, more processes than GPUs."""

import sys

import pytest
import torch

from utils import distributed
from utils.distributed import peak_memory, start_processes, unlike_devices
from utils.errors import ConfigError


def test_without_unix_the_peak_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peak_memory(torch.device("cpu")) or 0) > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None


def test_devices_of_different_kinds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unlike_devices(torch.device("cpu")) is None
    monkeypatch.setattr(distributed, "gather_objects", lambda name: ["A100", "H100", "A100"])
    assert unlike_devices(torch.device("cpu")) == "2 x A100, 1 x H100"


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
