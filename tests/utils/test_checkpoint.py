"""Checkpoints: written atomically, never executed, refused with a reason when they do not fit."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from model.load import load_weights
from tests.helpers.checkpoints import Bomb
from utils.checkpoint import load_checkpoint, load_state, save_checkpoint
from utils.errors import CheckpointError, ConfigError


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    content = {"model": {"w": torch.arange(3.0)}, "epoch": 2, "metrics": {"R1": 1.5, "list": [1, None]}}
    save_checkpoint(tmp_path / "a.pt", content)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["w"], content["model"]["w"]) and loaded["metrics"] == content["metrics"]
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("at", ["save", "replace"])
def test_a_failed_write_leaves_the_old_file(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "a.pt", {"epoch": 1})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save", full) if at == "save" else (os, "replace", full)))
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written .*No space left"):
        save_checkpoint(tmp_path / "a.pt", {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "a.pt") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_worker_that_dies_during_a_write_is_no_fault_of_the_disk(tmp_path: Path, monkeypatch) -> None:
    """torch raises the error from a signal handler, wherever the main process is."""

    def killed(*arguments: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(RuntimeError, match="killed by signal"):
        save_checkpoint(tmp_path / "a.pt", {"epoch": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_named(part: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model": {"w": torch.randn(500)}})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=r"a\.pt: damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pt", tmp_path / "was_run"
    if how == "torch":
        torch.save({"model": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Bomb(trace)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"a\.pt: refused"):
        load_checkpoint(path)
    assert not trace.exists()


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: must hold a checkpoint, got a list"):
        load_checkpoint(tmp_path / "list.pt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"format: unknown checkpoint format 'ira'; did you mean 'irra'"):
        load_weights(nn.Linear(1, 1), tmp_path / "w.pt", format="ira")


def test_another_architecture_is_told_tensor_by_tensor() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = nn.Sequential(nn.Linear(2, 4), nn.Identity(), nn.Linear(4, 1)).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_state(model, state, "x.pt")
    message = str(caught.value)
    assert message.startswith("x.pt: does not fit the architecture")
    for piece in ("2 missing (1.bias, 1.weight)", "2 unexpected (2.bias, 2.weight)", "0.weight (4, 2), here (3, 2)"):
        assert piece in message
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_state_that_is_not_finite_is_refused_before_anything_is_copied() -> None:
    model = nn.Linear(2, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"x\.pt: 1 tensors .*: bias \(NaN or infinite\); nothing was loaded"):
        load_state(model, {"weight": torch.zeros(3, 2), "bias": torch.tensor([0.0, float("nan"), 1.0])}, "x.pt")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, small_disk) -> None:
    save_checkpoint(tmp_path / "a.pt", {"epoch": 1})
    small_disk(20_000)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written"):
        save_checkpoint(tmp_path / "a.pt", {"epoch": 2, "model": torch.randn(100_000)})
    assert load_checkpoint(tmp_path / "a.pt") == {"epoch": 1} and os.listdir(tmp_path) == ["a.pt"]
