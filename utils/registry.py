"""Registries of components, for choice by name in YAML."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from utils.errors import ConfigError

T = TypeVar("T")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?` if one of `choices` is close to `name`, else a list of all choices."""
    choices = list(choices)
    near = difflib.get_close_matches(name[:80], choices, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(choices) or 'nothing'}"


class Registry(Generic[T]):
    """Name -> component.

    Args:
        kind: word for a component in error messages, for instance "loss".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._components: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator to register a component."""

        def enter(component: T) -> T:
            assert name not in self._components, f"{self.kind} '{name}' is registered twice"
            self._components[name] = component
            return component

        return enter

    def get(self, name: str, path: str) -> T:
        """The component of this name.

        Args:
            name: registered name.
            path: config key that asked for it, for the error message.

        Raises:
            ConfigError: no component has this name.
        """
        if name not in self._components:
            raise ConfigError(f"{path}: unknown {self.kind} '{name}'; {did_you_mean(name, self._components)}")
        return self._components[name]

    def values(self) -> Iterable[T]:
        return self._components.values()

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)
