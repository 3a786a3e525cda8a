"""Readers of weight files: torch, TorchScript, safetensors, Hugging Face folders. They run no code of the file."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from model.checkpoints.torchscript import is_torchscript, read_torchscript
from model.checkpoints.unwrap import unwrapped, without_prefixes
from utils.checkpoint import load_checkpoint
from utils.errors import CheckpointError, first_line
from utils.integrity import check_intact
from utils.paths import why_not_a_file
from utils.signatures import check_signature, is_safetensors
from utils.tensors import check_storage

INDEX = ".index.json"
NAMES = (
    *("best.pt", "model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "last.pt"),
)
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read the content of a file of weights.

    Args:
        path: a checkpoint or state dict of torch, a TorchScript archive (OpenAI's CLIP), a safetensors file, a folder
            of Hugging Face's `save_pretrained`, or a run folder.

    Raises:
        CheckpointError: there is no such file, it is damaged, or its pickle would run code.
    """
    path = weights_file(path)
    try:
        return _read_shards(path) if path.name.endswith(INDEX) else _read_file(path)
    except CheckpointError:
        raise
    except Exception as error:  # readers raise errors of many types for damaged bytes
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({first_line(error)})") from None


def weights_file(path: str | Path) -> Path:
    """The file of weights, or index of shards, that a path means: in a folder, `best.pt` of a run or the usual names.

    Raises:
        CheckpointError: a folder holds none of them, or several files of weights under other names.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) == 1:
        return others[0]
    found = f"several files, {', '.join(file.name for file in others[:5])}" if others else "a folder without weights"
    raise CheckpointError(
        f"{path}: must be a file of weights, or contain best.pt, model.safetensors, model.safetensors.index.json or "
        f"pytorch_model.bin, got {found}; name the file"
    )


def _read_file(path: Path) -> dict[str, Any]:
    """Read one file of any kind, told by its content, after the comparison with its checksums."""
    if not path.is_file() or why_not_a_file(path):
        return load_checkpoint(path)  # says what it is
    if is_safetensors(path) or (path.suffix == ".safetensors" and not zipfile.is_zipfile(path)):
        check_intact(path)
        check_signature(path)
        return dict(load_file(path))
    if is_torchscript(path):
        check_intact(path)
        return dict(read_torchscript(path))
    return load_checkpoint(path)  # compares by itself


def _read_shards(index: Path) -> dict[str, Any]:
    """Read the shards that an index of Hugging Face lists."""
    check_signature(index, text=True)
    shards = sorted({Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing, {', '.join(missing[:5])}; download them too"
        )
    return {name: value for shard in shards for name, value in _read_file(index.parent / shard).items()}


def state_dict_of(content: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, without prefixes of DataParallel, `torch.compile` and the like.

    Args:
        content: a state dict, or a checkpoint with one under `model`, `state_dict` or another name of the field.
        source: path of the file, for error messages.

    Raises:
        CheckpointError: there are few tensors among other values, or sparse, quantised or meta tensors.
    """
    state = {str(name): value for name, value in unwrapped(content).items()}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if 2 * len(strange) >= len(state):
        what = f"'{strange[0]}', a {type(state[strange[0]]).__name__}" if strange else "nothing"
        raise CheckpointError(f"{source}: must hold a state dict of names and tensors, got {what}")
    state = {name: value for name, value in state.items() if name not in strange}  # an epoch, a version
    check_storage(state, source)
    return without_prefixes(state)
