"""Reading of torch's pickles without running code: plain data beside the weights is stepped over."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import CheckpointError

# Packages whose classes hold settings, numbers, paths and dates.
PLAIN = re.compile(
    r"(argparse|numpy|pathlib|datetime|zoneinfo|decimal|fractions|uuid|enum|collections|types\.SimpleNamespace|typing"
    r"|omegaconf|yacs|easydict|addict|munch|ml_collections|mmcv|mmengine|pytorch_lightning|lightning|lightning_fabric"
    r"|pandas|torch\.torch_version|builtins\.(set|frozenset|complex|slice|range|xrange|bytearray|object"
    r"|dict|list|tuple|int|float|str|bool|type))(\.|$)"
)
DICTS = re.compile(r"(^|\.)(defaultdict|EasyDict|CfgNode|Dict|ConfigDict|AttributeDict|Munch|DefaultMunch)$")
LISTS = re.compile(r"(^|\.)deque$")
NAMED = re.compile(r"GLOBAL (\S+) (was not|whose module)")  # torch's words for a class or function that a pickle names
MOST_NAMES, MOST_LEVELS = 200, 8


class Opaque:
    """Placeholder for an object that is not read; `is_module` is True for a module of torch."""

    is_module = False

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.is_module = isinstance(state, dict) and "_modules" in state


class _OpaqueDict(Opaque):
    """Placeholder for a subclass of dict; torch fills plain ones alone."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _OpaqueList(Opaque):
    """Placeholder for a subclass of list."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


def read_pickle(path: str | Path) -> Any:
    """Read a file of `torch.save` onto the CPU. No class or function that it names is imported or called.

    Raises:
        CheckpointError: it names more than tensors and plain data.
        Exception: the file is damaged; torch raises errors of many types.
    """
    names: list[str] = []
    while True:
        try:
            # an open file, because torch reads a path called .safetensors otherwise
            with open(path, "rb") as file, torch.serialization.safe_globals([_placeholder(name) for name in names]):
                content = torch.load(file, map_location="cpu", weights_only=True)
            break
        except Exception as error:
            name = _named(error)
            if name is None and not names:
                raise
            if name is None or name in names or len(names) == MOST_NAMES:
                raise _refusal(path, names, None) from None
            names.append(name)
    if all(PLAIN.match(name) for name in names):
        return content
    raise _refusal(path, names, content)


def _named(error: Exception) -> str | None:
    """The class or function that a pickle names, in torch's message; torch leaves out `builtins`."""
    found = NAMED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return None if found is None else found[1] if "." in found[1] else f"builtins.{found[1]}"


def _placeholder(name: str) -> type[Opaque]:
    """A class with this name, by which torch finds it."""
    module, _, short = name.rpartition(".")
    base = _OpaqueDict if DICTS.search(name) else _OpaqueList if LISTS.search(name) else Opaque
    return type(short, (base,), {"__module__": module})


def _refusal(path: str | Path, names: list[str], content: Any) -> CheckpointError:
    """The error for a file that names code, with the command that saves its weights alone, if they can be found."""
    foreign = [name for name in names if not PLAIN.match(name)] or names
    what = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
    place = next(_places(content), None)
    advice = (
        "ask its authors for a state dict"
        if place is None
        else f"if you trust its source, save its state dict alone, in a session of Python that has {foreign[0]}: "
        f"torch.save(torch.load('{path}', weights_only=False){place}, 'weights.pt')"
    )
    return CheckpointError(
        f"{path}: refused, because it holds more than weights ({what}) and reading it could run code; {advice}"
    )


def _places(content: Any, place: str = "", level: int = 0) -> Iterator[str]:
    """Python expressions behind the content that give a state dict."""
    if isinstance(content, Opaque) and content.is_module:
        yield f"{place}.state_dict()"
    if not isinstance(content, Mapping) or level > MOST_LEVELS:
        return
    if content and all(isinstance(value, Tensor) for value in content.values()):
        yield place
    for key, value in content.items():
        yield from _places(value, f"{place}[{key!r}]", level + 1)
