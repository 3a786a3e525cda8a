"""Every path of a config that names a file: code in the file is not run, and the error is in plain words."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, CLIPTextConfig

from configs.schema import load_config
from datasets.noise import noise_index
from datasets.text.tokenizers import build_tokenizer
from model.build import build_task, build_teacher
from tests.helpers.checkpoints import BERT, Bomb
from tests.helpers.configs import ROOT, TINY, TINY_IVT
from utils.errors import CheckpointError, ConfigError

WRITERS: dict[str, Callable[[Bomb, Path], object]] = {
    "torch": lambda bomb, file: torch.save({"model": bomb}, file),
    "old torch": lambda bomb, file: torch.save({"model": bomb}, file, _use_new_zipfile_serialization=False),
    "pickle": lambda bomb, file: file.write_bytes(pickle.dumps({"model": bomb}, protocol=2)),
    "numpy": lambda bomb, file: file.open("wb").write(_npy(bomb)),
}
READERS: dict[str, Callable[[Path], object]] = {
    "init.path": lambda file: _task(f"init.path={file}"),
    "model.image.pretrained": lambda file: _task(f"model.image.pretrained={file}"),
    "teacher.checkpoint": lambda file: build_teacher(_config(f"teacher.checkpoint={file}")),
    "data.noise_file": lambda file: noise_index(_config("data.noise_rate=0.5", f"data.noise_file={file}").data, 8),
    "data.tokenizer": lambda file: build_tokenizer(str(file), 64),
    "--config": load_config,
}


def _npy(bomb: Bomb) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps(np.array([bomb]))


def _config(*overrides: str, method: str = "baseline"):
    return load_config(ROOT / f"configs/{method}.yaml", [*(TINY_IVT if method == "ivt" else TINY), *overrides])


def _task(*overrides: str, method: str = "baseline"):
    return build_task(_config(*overrides, method=method), num_pids=5)


@pytest.mark.parametrize("path", READERS)
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.npy", "x.txt.gz", "x.npz"])
def test_no_path_of_a_config_runs_a_pickle(name: str, kind: str, path: str, tmp_path: Path) -> None:
    WRITERS[kind](Bomb(tmp_path / "was_run"), tmp_path / name)
    with pytest.raises((CheckpointError, ConfigError), match=name):
        READERS[path](tmp_path / name)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("method", ["baseline", "ivt"])
def test_no_folder_of_a_text_tower_runs_a_pickle_or_its_own_code(
    method: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = code_folder(tmp_path / "text", monkeypatch)
    config = BertConfig(**BERT) if method == "ivt" else CLIPTextConfig(hidden_size=64, num_hidden_layers=1)
    auto_map = {"AutoConfig": "code.A", "AutoModel": "code.A", "AutoTokenizer": ["code.A", None]}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"auto_map": auto_map}))
    torch.save({"model": Bomb(tmp_path / "was_run")}, folder / "a.bin")
    if weights.endswith("index.json"):
        (folder / weights).write_text(json.dumps({"metadata": {}, "weight_map": {"w": "a.bin"}}))
    else:
        (folder / "a.bin").rename(folder / weights)
    for overrides in (["model.text.pretrained=true", f"model.text.arch={folder}"], [f"init.path={folder}"]):
        with pytest.raises((CheckpointError, ConfigError), match="text"):
            _task("model.text.options={}", *overrides, method=method)
    assert not (tmp_path / "was_run").exists()


def code_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face folder whose tokenizer is a program, and a user that agrees to run it."""
    folder.mkdir()
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(folder.parent / 'was_run')!r})\n")
    auto_map = {"AutoTokenizer": ["code.A", "code.A"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "A", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *prompt: (folder.parent / "was_asked").touch() or "y")
    return folder


@pytest.mark.parametrize("legacy", [False, True])
def test_the_code_of_a_tokenizer_folder_is_never_run_nor_asked_about(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = code_folder(tmp_path / "tokenizer", monkeypatch)
    if legacy:  # the form of older versions of transformers
        content = {"tokenizer_class": "A", "auto_map": ["code.A", "code.A"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    message = r"^data\.tokenizer: must be a tokenizer without custom code, got '.*tokenizer', whose code is never run"
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(str(folder), 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer"]
