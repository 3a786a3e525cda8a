"""Checkpoints: written whole or not at all, read without running what is in them."""

import contextlib
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.errors import CheckpointError
from utils.torchscript import is_torchscript, read_torchscript


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` by way of a temporary file, so that a kill leaves the old file or the new one.

    Raises:
        CheckpointError: the disk is full or not writable; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error})") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU; tensors and plain values only, no code is run.

    Raises:
        CheckpointError: no such file, cut or damaged, or a pickle that would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():  # torch's word for a class or function that a pickle names
            raise CheckpointError(
                f"{path}: refused: it holds more than weights, and reading it could run code; if you trust its "
                "source, save its state dict alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
            ) from None
        raise CheckpointError(f"{path}: damaged or no checkpoint (no pickle of weights)") from None
    except Exception as error:  # damaged bytes make the readers raise errors of many types
        raise CheckpointError(f"{path}: damaged or no checkpoint ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no checkpoint (it holds a {type(content).__name__})")
    return content


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
        raise CheckpointError(f"{path}: damaged or no checkpoint ({_first_line(error)})") from None
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


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `module`; every name and shape must fit.

    Raises:
        CheckpointError: the checkpoint is of another architecture; says which tensors differ.
    """
    own = module.state_dict()
    problems = [
        *_listed("missing", own.keys() - state.keys()),
        *_listed("unexpected", state.keys() - own.keys()),
        *_listed(
            "of another shape",
            (
                f"{name} {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
                for name in own.keys() & state.keys()
                if own[name].shape != state[name].shape
            ),
        ),
    ]
    if problems:
        raise CheckpointError(f"{source}: of another architecture than the config's: {'; '.join(problems)}")
    module.load_state_dict(dict(state))


def _listed(what: str, names: Iterable[str], most: int = 3) -> list[str]:
    found = sorted(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return [f"{len(found)} {what} ({', '.join(found[:most])}{more})"] if found else []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
