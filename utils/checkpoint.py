"""Checkpoints: written atomically, read without running code."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError, first_line
from utils.faults import disk_fault
from utils.files import replacing
from utils.integrity import check_intact, seal
from utils.paths import in_full
from utils.placement import placed_as
from utils.signatures import check_signature
from utils.tensors import check_storage, check_values
from utils.unpickling import read_pickle


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` with a seal, in place of an existing file.

    A kill leaves the old file or the new one.

    Args:
        path: file to write.
        content: tensors and plain values.

    Raises:
        CheckpointError: the disk is full or not writable; the old file is unchanged.
    """
    try:
        with replacing(path) as file:
            torch.save(dict(content), file)
            seal(file)
    except (OSError, RuntimeError) as error:
        if (fault := disk_fault(error)) is None:  # for instance a killed worker, whose signal may arrive here
            raise
        raise CheckpointError(f"{path}: cannot be written ({fault})") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint` onto the CPU: tensors and plain values, without running code.

    Settings and numbers of other libraries, such as argparse.Namespace, become placeholders.

    Raises:
        CheckpointError: there is no such file, it is damaged, or its pickle would run code.
    """
    try:
        check_intact(path)
        check_signature(path)
        content = read_pickle(path)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{in_full(path)}: no such checkpoint") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: damaged, or no checkpoint (no pickle of weights)") from None
    except Exception as error:  # readers raise errors of many types for damaged bytes
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a checkpoint, got a {type(content).__name__}")
    return content


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `module`; every name, shape and kind of number must match.

    Args:
        module: module to load into.
        state: name -> tensor.
        source: path of the file, for error messages.

    Raises:
        CheckpointError: the architectures differ, or values are not finite; names the tensors.
    """
    check_storage(state, source)
    current = module.state_dict()
    problems = [
        *_listed("missing", current.keys() - state.keys()),
        *_listed("unexpected", state.keys() - current.keys()),
        *_listed(
            "of another shape",
            (
                f"{name} {tuple(state[name].shape)}, here {tuple(current[name].shape)}"
                for name in current.keys() & state.keys()
                if current[name].shape != state[name].shape
            ),
        ),
    ]
    if problems:
        raise CheckpointError(f"{source}: does not fit the architecture of the config: {'; '.join(problems)}")
    check_values(state, current, source)
    module.load_state_dict({name: placed_as(current[name], value) for name, value in state.items()})


def _listed(what: str, names: Iterable[str], most: int = 3) -> list[str]:
    found = sorted(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return [f"{len(found)} {what} ({', '.join(found[:most])}{more})"] if found else []
