"""Weight files: damaged files and folders are named, wrappers and prefixes are removed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoints.files import read_weights, state_dict_of
from model.load import load_weights
from tests.helpers.checkpoints import CONTAINERS, our_clip
from utils.errors import CheckpointError
from utils.integrity import file_hash


def cut(path: Path, part: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


@pytest.mark.parametrize("part", [0, 0.3, 0.99])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_short_is_named(container: str, part: float, tmp_path: Path) -> None:
    save, name = CONTAINERS[container]
    save({"visual.conv1.weight": torch.randn(40, 40)}, tmp_path / name)
    cut(tmp_path / name, part)
    with pytest.raises(CheckpointError, match=rf"{name}: damaged, or no checkpoint"):
        load_weights(our_clip(), tmp_path / name)


@pytest.mark.parametrize("container", CONTAINERS)
def test_damaged_bytes_never_end_in_a_traceback(container: str, tmp_path: Path) -> None:
    save, name = CONTAINERS[container]
    save({"visual.conv1.weight": torch.randn(8, 8)}, tmp_path / name)
    good, task, rng = (tmp_path / name).read_bytes(), our_clip(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(good)
        for place in rng.integers(len(good), size=rng.choice([1, 3, 30])):
            damaged[place] = rng.integers(256)
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError):  # weights are missing in any case
            load_weights(task, tmp_path / name)


@pytest.mark.parametrize("container", ["TorchScript archive", "safetensors", "folder"])
def test_a_file_that_differs_from_its_checksum_is_refused(container: str, tmp_path: Path) -> None:
    save, name = CONTAINERS.get(container, CONTAINERS["safetensors"])
    path = tmp_path / ("model.safetensors" if container == "folder" else name)
    save({"visual.conv1.weight": torch.zeros(40, 40)}, path)
    content = bytearray(path.read_bytes())
    if container != "TorchScript archive":  # its archive holds checksums
        path.with_name(f"{path.name}.sha256").write_text(f"{file_hash(path)}  {path.name}\n")
    content[content.rindex(bytes(4000)) + 2000] = 1  # in the tensor: readers do not notice
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path.name}: damaged \((its SHA-256|wrong checksum)"):
        read_weights(tmp_path if container == "folder" else path)


def hugging_face_folder_with(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda folder: None, r"must contain model\.safetensors"),
    "safetensors no safetensors": (hugging_face_folder_with("model.safetensors", b"{}"), "damaged, or no checkpoint"),
    "bin no checkpoint": (hugging_face_folder_with("pytorch_model.bin", b"\x00" * 9), r"model\.bin: damaged, or no"),
    "index no JSON": (hugging_face_folder_with("model.safetensors.index.json", b"{"), "damaged, or no checkpoint"),
    "index without map": (hugging_face_folder_with("model.safetensors.index.json", b"{}"), "damaged.*weight_map"),
    "index of a list": (hugging_face_folder_with("model.safetensors.index.json", b"[1]"), "damaged, or no checkpoint"),
    "shard gone": (
        hugging_face_folder_with("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}'),
        "no such checkpoint",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_without_good_weights_is_named(case: str, tmp_path: Path) -> None:
    make, message = BAD_FOLDERS[case]
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(our_clip(), tmp_path)


BAD_CONTENTS: dict[str, tuple[Any, str]] = {
    "empty": ({}, "must hold a state dict .*, got nothing"),
    "numbers": ({"lr": 0.1}, r"must hold a state dict .*, got 'lr', a float"),
    "nested too deep": ({"model": {"weights": {"a": torch.zeros(1)}}}, "got 'weights', a dict"),
    "of no known format": (
        {"backbone.w": torch.zeros(1)},
        r"unknown checkpoint format, got .*backbone\.w.*own, openai",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_a_file_without_known_weights_is_named(case: str, tmp_path: Path) -> None:
    content, message = BAD_CONTENTS[case]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth.*" + message):
        load_weights(our_clip(), tmp_path / "x.pth")


def test_prefixes_and_wrappers_are_taken_off() -> None:
    tensor = torch.zeros(1)
    assert state_dict_of({"model": {"module.a": tensor}, "epoch": 1}, "x").keys() == {"a"}
    assert state_dict_of({"state_dict": {"a": tensor}}, "x").keys() == {"a"}
    assert state_dict_of({"module.a": tensor, "b": tensor}, "x").keys() == {"module.a", "b"}
