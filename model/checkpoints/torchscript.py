"""Reader of TorchScript archives, OpenAI's format of CLIP. It does not run the program inside."""

import collections
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

STORAGES = {
    f"{kind}Storage": getattr(torch, dtype)
    for kind, dtype in {
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Float": "float32",
        "Double": "float64",
        "Bool": "bool",
        "Byte": "uint8",
        "Char": "int8",
        "Short": "int16",
        "Int": "int32",
        "Long": "int64",
    }.items()
}


def is_torchscript(path: str | Path) -> bool:
    """True for a zip archive with a TorchScript program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: str | Path) -> dict[str, Tensor]:
    """Read dotted name -> tensor for all parameters, buffers and other tensors of the modules, on the CPU.

    `torch.jit.load` is not used: it compiles and runs the program, and torch has deprecated it.

    Raises:
        OSError, zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError: the archive is damaged, or holds
            other objects than modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(pickled) as file:
            return dict(_tensors(_Unpickler(file, archive, pickled.removesuffix(".pkl")).load()))


class _Module:
    """Placeholder for the classes of the archive, with their attributes."""


class _Unpickler(pickle.Unpickler):
    """Unpickles modules, tensors and lists, and refuses everything else."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle":  # annotates the type of a list
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"it contains a {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, length = pid
        content = bytearray(self.archive.read(f"{self.folder}/{key}"))
        return torch.frombuffer(content, dtype=dtype, count=length) if length else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
