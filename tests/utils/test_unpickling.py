"""Objects beside the weights: plain data is stepped over, code is refused with advice for the file, nothing is run."""

import argparse
import collections
import datetime
import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import load_checkpoint
from utils.errors import CheckpointError


class EasyDict(dict):
    """Settings as a subclass of dict, under the name that another package has."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__ = self


EasyDict.__module__ = "easydict"

PLAIN: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=1e-5, folder=Path("runs")),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "number of NumPy": np.float64(1.5),
    "integer of NumPy": np.int64(3),
    "array": np.arange(3.0),
    "array of objects": np.array(["a", None], dtype=object),
    "path": Path("data"),
    "date": datetime.datetime(2024, 1, 1),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2], maxlen=3),
    "set": {1, 2},
    "nested": {"args": [argparse.Namespace(a=np.float32(1))]},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", PLAIN)
def test_plain_data_beside_weights_is_stepped_over(case: str, legacy: bool, tmp_path: Path) -> None:
    content = {"args": PLAIN[case], "state_dict": {"w": torch.arange(3.0)}, "epoch": 2}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    loaded = load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3.0)) and loaded["epoch"] == 2
    assert type(loaded["args"]) is not argparse.Namespace


def test_a_subclass_of_dict_is_stepped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("easydict")
    module.EasyDict = EasyDict  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "easydict", module)
        torch.save({"cfg": EasyDict(a=1), "model": {"w": torch.zeros(1)}}, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt")["model"].keys() == {"w"}


class Settings:
    """Class of a training program."""


class Call:
    """Object that calls a function when it is unpickled."""

    def __reduce__(self):
        return pickle.loads, (b"",)


REFUSED: dict[str, tuple[Any, str]] = {
    "settings beside a state dict": ({"state_dict": {"w": torch.zeros(1)}, "cfg": Settings()}, "['state_dict']"),
    "settings beside nested weights": ({"a": {"net": {"w": torch.zeros(1)}}, "cfg": Settings()}, "['a']['net']"),
    "model under a name": ({"model": nn.Sequential(nn.Linear(1, 1))}, "['model'].state_dict()"),
    "model": (nn.Sequential(nn.Linear(1, 1)), ".state_dict()"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_advice_for_a_refused_file_works(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, place = REFUSED[case]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: refused, because it holds more than weights \(") as caught:
        load_checkpoint(tmp_path / "x.pt")
    command = str(caught.value)[str(caught.value).index("torch.save(") :]
    assert f"weights_only=False){place}, " in command
    monkeypatch.chdir(tmp_path)
    exec(command)  # as the reader of the message would
    assert all(isinstance(value, torch.Tensor) for value in load_checkpoint(tmp_path / "weights.pt").values())


def test_without_weights_there_is_no_advice_to_run_the_file(tmp_path: Path) -> None:
    torch.save({"state_dict": Call()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"refused.*pickle\.loads.*ask its authors for a state dict") as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)
