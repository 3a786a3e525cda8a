"""Experiment trackers: further destinations of a run's numbers, besides its log and metrics.jsonl."""

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from torch.utils.tensorboard import SummaryWriter

from utils.config import named_options
from utils.errors import ConfigError, first_line
from utils.faults import disk_fault, shortage
from utils.logger import LOGGER
from utils.registry import Registry

Result = TypeVar("Result")


class Tracker(ABC):
    """Interface of a tracker.

    A subclass takes the run folder, the first epoch and, keyword-only, the options that YAML may set.
    """

    requires: ClassVar[str | None] = None  # package that it imports, if it is optional

    @abstractmethod
    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of an epoch's record, which has the key `epoch`; nested ones are named `val/R1`."""

    @abstractmethod
    def log_text(self, name: str, text: str) -> None:
        """Log a text, such as the config or the result table."""

    @abstractmethod
    def close(self) -> None:
        """Write everything out; called once at the end."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker", "processor")


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """TensorBoard event files in the run folder."""

    def __init__(self, run: Path, epoch: int) -> None:
        self.writer = SummaryWriter(str(run), purge_step=epoch)

    def log(self, record: Mapping[str, Any]) -> None:
        for tag, value in flatten(record):
            self.writer.add_scalar(tag, value, record["epoch"])

    def log_text(self, name: str, text: str) -> None:
        self.writer.add_text(name, f"```\n{text}\n```")

    def close(self) -> None:
        self.writer.close()


@TRACKERS.register("wandb")
class WeightsAndBiases(Tracker):
    """Weights & Biases; a resumed run continues its curves.

    Args:
        project: project that the run belongs to.
        entity: user or team; null uses the default of the account.
        mode: online, or offline to upload later with `wandb sync`.
    """

    requires = "wandb"

    def __init__(
        self,
        run: Path,
        epoch: int,
        *,
        project: str = "text-to-image-person-retrieval",
        entity: str | None = None,
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        import wandb

        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=project, entity=entity, mode=mode, name=run.name, dir=str(run), id=identity, resume="allow"
        )

    def log(self, record: Mapping[str, Any]) -> None:
        self.run.log(dict(flatten(record)), step=record["epoch"])

    def log_text(self, name: str, text: str) -> None:
        self.run.summary[name] = text

    def close(self) -> None:
        self.run.finish()


class Guarded(Tracker):
    """A tracker whose failure stops no training: a warning reports the first one, and nothing is logged after it.

    Args:
        name: its name in `train.trackers`.
        build: constructor without arguments.
    """

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        self.name = name
        self.tracker: Tracker | None = self._tried(build)

    def log(self, record: Mapping[str, Any]) -> None:
        if self.tracker is not None:
            self._tried(partial(self.tracker.log, record))

    def log_text(self, name: str, text: str) -> None:
        if self.tracker is not None:
            self._tried(partial(self.tracker.log_text, name, text))

    def close(self) -> None:
        if self.tracker is not None:
            self._tried(self.tracker.close)

    def _tried(self, call: Callable[[], Result]) -> Result | None:
        try:
            return call()
        except Exception as error:  # a tracker may need a disk, a network or an account
            self.tracker = None
            reason = disk_fault(error) or shortage(error) or f"{type(error).__name__}: {first_line(error)}"
            LOGGER.warning("train.trackers: %s failed, and training continues without it (%s)", self.name, reason)
            return None


def flatten(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, number) of every number of a record; nested ones are named `val/R1`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        else:
            yield name, value


def tracker_options(trackers: Sequence[Any]) -> list[dict[str, dict[str, Any]]]:
    """A config's `train.trackers` with every option spelt out and checked.

    Raises:
        ConfigError: unknown tracker or option, or its package is not installed.
    """
    chosen = named_options(trackers, TRACKERS, "train.trackers")
    for name, _ in chosen:
        package = TRACKERS.get(name, "train.trackers").requires
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"train.trackers: {name} needs the package {package}; pip install {package}")
    return [{name: options} for name, options in chosen]


def build_trackers(trackers: Sequence[Any], run: Path, epoch: int) -> list[Tracker]:
    """The trackers of a config.

    Args:
        trackers: `train.trackers`.
        run: run folder.
        epoch: the epoch to begin or resume with.
    """
    built: list[Tracker] = []
    for name, options in named_options(trackers, TRACKERS, "train.trackers"):
        constructor: Callable[..., Tracker] = TRACKERS.get(name, "train.trackers")
        built.append(Guarded(name, partial(constructor, run, epoch, **options)))
    return built
