"""Registries of components, for choice by name in YAML."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from utils.errors import ConfigError

T = TypeVar("T")
MOST_CHOICES = 6  # in a message


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?` if one of `choices` is close to `name`, else the nearest few of them."""
    choices = list(choices)
    near = nearest(name, choices)
    return f"did you mean '{near}'?" if near else f"choose from {listed(choices, name)}"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that is close to `name`, or alone begins with it; None if there is none. Case and hyphens may differ.

    `CUHK` is close to `cuhk_pedes`, for instance.
    """
    spelt = {_plainly(choice): choice for choice in reversed(list(choices))}
    plain = _plainly(name[:80])
    begun = [choice for choice in spelt if plain and (choice.startswith(plain) or plain.startswith(f"{choice}_"))]
    close = difflib.get_close_matches(plain, spelt, n=1)
    alike = bool(close) and difflib.SequenceMatcher(None, plain, close[0]).ratio() > 0.8
    near = begun if len(begun) == 1 and not alike else close
    return spelt[near[0]] if near else None


def listed(choices: Iterable[str], name: str = "") -> str:
    """The choices for a message; of a long list, those most like `name` and the number of the others."""
    choices = list(choices)
    if len(choices) <= MOST_CHOICES:
        return ", ".join(choices) or "nothing"
    likeness = {
        choice: difflib.SequenceMatcher(None, _plainly(name[:80]), _plainly(choice)).ratio() for choice in choices
    }
    few = sorted(choices, key=lambda choice: -likeness[choice])[:MOST_CHOICES]
    return f"{', '.join(few)} and {len(choices) - MOST_CHOICES} others"


def _plainly(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def import_modules(package: str) -> None:
    """Import every module of a package, in alphabetical order, so that they register their components."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


class Registry(Generic[T]):
    """Name -> component.

    Args:
        kind: word for a component in error messages, for instance "loss".
        package: package whose modules may register components; they are imported before the first look-up.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
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
        if name not in self._loaded():
            raise ConfigError(f"{path}: unknown {self.kind} '{name}'; {did_you_mean(name, self)}")
        return self._components[name]

    def values(self) -> Iterable[T]:
        return self._loaded().values()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def _loaded(self) -> dict[str, T]:
        if self._package is not None:
            package, self._package = self._package, None
            import_modules(package)
        return self._components
