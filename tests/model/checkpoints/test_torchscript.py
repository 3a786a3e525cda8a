"""TorchScript archives: the tensors that torch reads, without running the program in the archive."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoints.files import read_weights
from model.checkpoints.torchscript import read_torchscript
from tests.helpers.checkpoints import save_torchscript, their_clip
from utils.errors import CheckpointError


def test_an_archive_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    state = their_clip((224, 224)).state_dict() | {
        "visual.w": torch.arange(12.0).reshape(3, 4).T,
        "b": torch.tensor([]),
    }
    save_torchscript(state, tmp_path / "a.pt")
    expected = torch.jit.load(str(tmp_path / "a.pt")).state_dict()
    read = read_torchscript(tmp_path / "a.pt")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in expected.items())


def test_an_archive_with_another_class_is_refused(tmp_path: Path) -> None:
    """Check that its pickle is not run."""

    class Bomb:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(tmp_path / 'was_run')!r}, 'w')",)

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", pickle.dumps({"w": Bomb()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"a\.pt: damaged, or no checkpoint \(it contains a .*eval\)"):
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "was_run").exists()
