"""Weight files: damaged files and folders are named, wrappers and prefixes are removed."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints.files import read_weights, state_dict_of, weights_file
from model.load import load_weights
from tests.helpers.checkpoints import CONTAINERS, our_clip, their_clip
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
    "empty": (lambda folder: None, r"or contain best\.pt, model\.safetensors.*a folder without weights"),
    "safetensors no safetensors": (hugging_face_folder_with("model.safetensors", b"{}"), "damaged, or no checkpoint"),
    "bin no checkpoint": (hugging_face_folder_with("pytorch_model.bin", b"\x00" * 9), r"model\.bin: damaged, or no"),
    "index no JSON": (hugging_face_folder_with("model.safetensors.index.json", b"{"), "damaged, or no checkpoint"),
    "index without map": (hugging_face_folder_with("model.safetensors.index.json", b"{}"), "damaged.*weight_map"),
    "index of a list": (hugging_face_folder_with("model.safetensors.index.json", b"[1]"), "damaged, or no checkpoint"),
    "shard gone": (
        hugging_face_folder_with("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}'),
        r"1 of 1 shards are missing, x\.safetensors",
    ),
    "two files of other names": (
        lambda folder: [(folder / name).touch() for name in ("a.pt", "b.pth")],
        r"several files, a\.pt, b\.pth; name the file",
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
    "of a ResNet": ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, "image tower is a ResNet .*, which is not supp"),
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


WEIGHTS = {name: torch.zeros(1) for name in ("visual.proj", "ln_final.bias", "text_projection")}


def under(prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in WEIGHTS.items()}


CONTENTS: dict[str, dict[str, Any]] = {
    "plain": WEIGHTS,
    "model": {"model": under("module."), "epoch": 1},
    "state_dict": {"state_dict": WEIGHTS, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}},
    "model_state_dict": {"model_state_dict": WEIGHTS, "loss": torch.zeros(1)},
    "net": {"net": WEIGHTS, "epoch": 1},
    "weights in weights": {"weights": {"state_dict": {"model": WEIGHTS}}},
    "settings called model": {"model": {"name": "ViT"}, "state_dict": WEIGHTS},
    "average alone": {"model": None, "ema": {"module": WEIGHTS, "decay": 0.99}},
    "container of any name": {"my_clip": WEIGHTS, "epoch": 3, "scheduler": {"last_epoch": 3}},
    "compiled": under("_orig_mod."),
    "compiled in DataParallel": {"state_dict": under("module._orig_mod.")},
    "DataParallel in compiled": {"state_dict": under("_orig_mod.module.")},
    "twice parallel": under("module.module."),
    "Lightning": {"state_dict": under("model."), "hyper_parameters": {}},
    "Lightning, compiled": {"state_dict": under("model._orig_mod.module.clip.")},
    "beside an epoch": WEIGHTS | {"epoch": 3},
    "a compiled tower": {name.replace("visual.", "visual._orig_mod."): value for name, value in WEIGHTS.items()},
}


@pytest.mark.parametrize("case", CONTENTS)
def test_prefixes_and_containers_are_taken_off(case: str) -> None:
    assert state_dict_of(CONTENTS[case], "x").keys() == WEIGHTS.keys()


def test_other_names_stay() -> None:
    tensor = torch.zeros(1)
    assert state_dict_of({"module.a": tensor, "b": tensor}, "x").keys() == {"module.a", "b"}
    assert state_dict_of(under("model.") | {"loss.queue": tensor}, "x").keys() == WEIGHTS.keys() | {"loss.queue"}
    same = {"model.a": tensor, "model.module.b": tensor, "a": tensor}
    assert state_dict_of(same, "x").keys() == same.keys()
    itself: dict[str, Any] = {}
    itself["model"] = itself
    with pytest.raises(CheckpointError, match="must hold a state dict"):
        state_dict_of(itself, "x")


FOREIGN: dict[str, tuple[bytes, str]] = {
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "an HTML page": (b"\n<!DOCTYPE html><html><title>Quota exceeded</title>", "download the file itself"),
    "the file is empty": (b"", "copy it again"),
    "an XML page": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "download the file itself"),
    "a pickle that torch.save did not write": (pickle.dumps([1, 2, 3], protocol=4), "torch.save"),
    "a text file, '404: Not Found": (b"404: Not Found", "download the file itself"),
    "compressed by gzip": (b"\x1f\x8b\x08" + bytes(30), "unpack it"),
    "a tar archive": (b"a.pt" + bytes(253) + b"ustar" + bytes(300), "unpack it"),
    "a zip archive without weights": (b"PK\x05\x06" + bytes(18), "unpack it"),
    'a text file, \'{ "weight_map"': (b'{\n "weight_map": {"a": "b.safetensors"}}', "download the file itself"),
}


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_holds_no_weights_is_told_by_its_first_bytes(what: str, name: str, tmp_path: Path) -> None:
    content, advice = FOREIGN[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / name)
    assert f"{name}: damaged, or no checkpoint ({what}" in str(caught.value) and advice in str(caught.value)


def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.pt")
    torch.save(WEIGHTS, tmp_path / "x.safetensors")
    assert read_weights(tmp_path / "x.pt").keys() == read_weights(tmp_path / "x.safetensors").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("names", [("best.pt", "last.pt", "epoch_002.pt"), ("any.pth",), ("pytorch_model.bin",)])
def test_a_folder_stands_for_the_weights_in_it(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        torch.save({"of": name}, tmp_path / name)
    assert read_weights(tmp_path) == {"of": names[0]}
    assert weights_file(tmp_path) == weights_file(tmp_path / names[0]) == tmp_path / names[0]


def test_the_index_of_shards_stands_for_them(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"visual.proj": "a.safetensors"}}')
    assert read_weights(index).keys() == read_weights(tmp_path).keys() == WEIGHTS.keys()


def test_any_prefix_that_all_names_have_is_taken_off_for_a_known_format(tmp_path: Path) -> None:
    state = their_clip((224, 224)).state_dict()
    torch.save({f"two_towers.{name}": value for name, value in state.items()}, tmp_path / "x.pt")
    report = load_weights(our_clip(), tmp_path / "x.pt")
    assert report.format == "openai" and not report.missing and not report.unexpected
