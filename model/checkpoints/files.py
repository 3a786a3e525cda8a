"""Weight files: torch, TorchScript, safetensors and Hugging Face folders -> named tensors; no code in them is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from model.checkpoints.torchscript import is_torchscript, read_torchscript
from utils.checkpoint import first_line, load_checkpoint
from utils.errors import CheckpointError


def read_weights(path: str | Path) -> dict[str, Any]:
    """What a file of weights holds, whoever wrote it: a checkpoint or state dict of torch, a TorchScript archive
    (OpenAI's CLIP), a `.safetensors` file, or a folder that Hugging Face's `save_pretrained` made.

    Raises:
        CheckpointError: no such file, cut or damaged, or a pickle that would run code.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.is_file() and is_torchscript(path):
            return dict(read_torchscript(path))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: damaged or no checkpoint ({first_line(error)})") from None
    return load_checkpoint(path)


def state_dict_of(content: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, which may stand under `model` or `state_dict`, without DataParallel's prefix.

    Raises:
        CheckpointError: there are none, or something else stands among them.
    """
    inner = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    state = {str(name): value for name, value in inner.items()}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        what = f"'{strange[0]}' is a {type(state[strange[0]]).__name__}" if strange else "it is empty"
        raise CheckpointError(f"{source}: holds no state dict, that is names and tensors ({what})")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _read_folder(folder: Path) -> dict[str, Any]:
    """The weights of a Hugging Face folder: one file, or the shards that its index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return dict(load_file(folder / "model.safetensors"))
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: value for shard in shards for name, value in load_file(folder / Path(shard).name).items()}
    if (folder / "pytorch_model.bin").is_file():
        return load_checkpoint(folder / "pytorch_model.bin")
    raise CheckpointError(
        f"{folder}: has no weights in it (model.safetensors, model.safetensors.index.json or pytorch_model.bin)"
    )
