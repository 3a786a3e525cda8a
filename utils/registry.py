"""Parts that a YAML chooses by name: a decorator to enter them, a lookup that knows the nearest right name."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from utils.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?` where one of `choices` is near `name`, else the list of all of them."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(choices) or 'nothing'}"


class Registry(Generic[T]):
    """Name -> part. `kind` is what error messages call it, for instance "loss"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def enter(part: T) -> T:
            assert name not in self._parts, f"{self.kind} '{name}' is registered twice"
            self._parts[name] = part
            return part

        return enter

    def get(self, name: str, path: str) -> T:
        """The part called `name`; `path` is the config key that asked for it.

        Raises:
            ConfigError: no part has this name.
        """
        if name not in self._parts:
            raise ConfigError(f"{path}: unknown {self.kind} '{name}'; {did_you_mean(name, self._parts)}")
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)
