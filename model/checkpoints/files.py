"""Readers of weight files: torch, TorchScript, safetensors, Hugging Face folders. They run no code of the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from model.checkpoints.torchscript import is_torchscript, read_torchscript
from utils.checkpoint import first_line, load_checkpoint
from utils.errors import CheckpointError
from utils.integrity import check_intact
from utils.paths import in_full
from utils.tensors import check_storage


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read the content of a file of weights.

    Args:
        path: a checkpoint or state dict of torch, a TorchScript archive (OpenAI's CLIP), a `.safetensors` file, or a
            folder of Hugging Face's `save_pretrained`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or its pickle would run code.
    """
    path = Path(path)
    try:
        return _read_folder(path) if path.is_dir() else _read_file(path)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{in_full(path)}: no such checkpoint") from None
    except Exception as error:  # readers raise errors of many types for damaged bytes
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({first_line(error)})") from None


def _read_file(path: Path) -> dict[str, Any]:
    """Read one file of any kind, after the comparison with its checksums."""
    if path.suffix == ".safetensors":
        check_intact(path)
        return dict(load_file(path))
    if path.is_file() and is_torchscript(path):
        check_intact(path)
        return dict(read_torchscript(path))
    return load_checkpoint(path)  # compares by itself


def state_dict_of(content: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, without DataParallel's prefix.

    Args:
        content: a state dict, or a checkpoint with one under `model` or `state_dict`.
        source: path of the file, for error messages.

    Raises:
        CheckpointError: there are no tensors, or other values among them, or sparse, quantised or meta tensors.
    """
    inner = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    state = {str(name): value for name, value in inner.items()}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        what = f"'{strange[0]}', a {type(state[strange[0]]).__name__}" if strange else "nothing"
        raise CheckpointError(f"{source}: must hold a state dict of names and tensors, got {what}")
    check_storage(state, source)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _read_folder(folder: Path) -> dict[str, Any]:
    """Read a Hugging Face folder with one file of weights, or with shards and an index."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return _read_file(folder / "model.safetensors")
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: value for shard in shards for name, value in _read_file(folder / Path(shard).name).items()}
    if (folder / "pytorch_model.bin").is_file():
        return _read_file(folder / "pytorch_model.bin")
    raise CheckpointError(
        f"{folder}: must contain model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )
