"""Damaged files: whatever changes in a checkpoint is noticed before its weights are used."""

import hashlib
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.common.damage import append, cut, flip_bit, zero_block
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError
from utils.integrity import check_intact, file_hash

CONTENT = {"model": {"w": torch.arange(4000.0), "b": torch.ones(7)}, "epoch": 3}


@pytest.mark.parametrize("damage", [flip_bit, zero_block, cut, append])
@pytest.mark.parametrize("sealed", [True, False], ids=["ours", "torch.save"])
def test_a_damaged_checkpoint_is_never_used(sealed: bool, damage, tmp_path: Path) -> None:
    path, draw = tmp_path / "a.pt", random.Random(f"{damage.__name__} {sealed}")
    save_checkpoint(path, CONTENT) if sealed else torch.save(CONTENT, path)
    intact = path.read_bytes()
    for _ in range(25):
        data = bytearray(intact)
        damage(data, draw)
        path.write_bytes(data)
        if data == intact:
            continue
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
        else:  # damage outside of the content, such as a time stamp in a header of torch's archive
            assert not sealed and torch.equal(loaded["model"]["w"], CONTENT["model"]["w"]) and loaded["epoch"] == 3


def test_a_sealed_checkpoint_is_an_archive_of_torch(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", CONTENT)
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["model"]["w"], CONTENT["model"]["w"])


@pytest.mark.parametrize("name", ["a.safetensors", "legacy.pt"])
def test_a_sha256_beside_a_file_is_compared(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "legacy.pt":
        torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    else:
        save_file(CONTENT["model"], path)
    done = subprocess.run(["sha256sum", name], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / f"{name}.sha256").write_text(done.stdout)
    check_intact(path)
    data = bytearray(path.read_bytes())
    flip_bit(data, random.Random(1))
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"damaged \(its SHA-256 is not the one in {name}\.sha256\)"):
        check_intact(path)


def test_pipes_and_folders_are_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match=r"pipe\.pt: must be a checkpoint, got a named pipe"):
        load_checkpoint(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="got a folder"):
        check_intact(tmp_path)
    with pytest.raises(CheckpointError, match="got a device"):
        check_intact("/dev/zero")


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
