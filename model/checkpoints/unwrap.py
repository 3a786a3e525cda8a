"""Containers and prefixes that training programs put around weights."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

CONTAINERS = (
    *("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "net_state_dict"),
    *("weights", "params", "student", "clip", "encoder", "checkpoint", "state"),
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema", "shadow"),
)
PREFIXES = ("module", "model", "net", "network", "clip", "clip_model", "_forward_module", "student")
# Names that wrappers of torch put at any place: compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MOST_LEVELS = 8  # a mapping may hold itself


def unwrapped(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state dict in the containers of a checkpoint; without one, the innermost container."""
    found = _state_in(content, 0)
    if found is not None:
        return found
    return next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), content)


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the names of wrappers, in any order and number.

    Other tensors may lie beside the model, such as those of a loss; they keep their names.
    """
    named = _renamed(state, lambda name: WRAPPERS.sub("", name))
    for _ in range(MOST_LEVELS):
        count, prefix = max((sum(name.startswith(f"{one}.") for name in named), one) for one in PREFIXES)
        if 2 * count <= len(named):
            break
        named = _renamed(named, partial(_without, f"{prefix}."))
    return named


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def without_shared_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the first word of its names, if all have the same."""
    words = {name.partition(".")[0] for name in state}
    return _renamed(state, partial(_without, f"{words.pop()}.")) if len(words) == 1 else dict(state)


def _state_in(content: Mapping[Any, Any], level: int) -> Mapping[Any, Any] | None:
    if level > MOST_LEVELS:
        return None
    mappings = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    for key in CONTAINERS:
        if key in mappings and (found := _state_in(mappings[key], level + 1)) is not None:
            return found
    if any(isinstance(value, Tensor) for value in content.values()):
        return content
    states = [value for value in mappings.values() if _is_state(value)]
    return states[0] if len(states) == 1 else None


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(name, str) and isinstance(one, Tensor) for name, one in value.items())


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The state dict under other names; unchanged if two tensors would get the same one."""
    renamed = {rename(name): value for name, value in state.items()}
    return renamed if len(renamed) == len(state) else dict(state)
