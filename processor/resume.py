"""Going on with a run that was interrupted: what may change, what it goes on from, and that nothing is in it twice."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.schema import Config, load_config
from processor.trainer import Trainer
from utils.checkpoint import load_checkpoint, load_state
from utils.config import to_plain, to_yaml
from utils.distributed import rank
from utils.errors import CheckpointError, ConfigError
from utils.logger import LOGGER, append_json_line

# The length of a run, its logs, and how its numbers are computed; all else makes it another experiment.
MAY_CHANGE = (
    *("train.epochs", "train.log_every", "train.save_every_steps", "train.output", "train.compile"),
    *("train.accumulate", "model.image.checkpointing", "model.text.checkpointing"),
    *("data.root", "data.workers", "eval.batch_size", "name"),
)


def run_config(run: Path, overrides: list[str]) -> Config:
    """The config of a run folder with overrides on top; raises `ConfigError` if it is none."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no run folder (there is no config.yaml in it)")
    return load_config(run / "config.yaml", overrides)


def check_changes(run: Path, before: Config, config: Config, *, force: bool) -> None:
    """Raise `ConfigError` where `config` makes a run another experiment, and that is not forced."""
    other = other_settings(before, config)
    if other and not force:
        listed = "\n".join(f"  {line}" for line in other)
        raise ConfigError(
            f"{run}: with these changes it would go on as another experiment (--force does so all the same):\n{listed}"
        )


def other_settings(before: Config, config: Config) -> list[str]:
    """`path: was -> is` for every setting whose change makes another experiment."""
    was, now = (dict(_leaves(to_plain(one))) for one in (before, config))
    changed = [path for path in sorted(was.keys() | now.keys()) if was.get(path) != now.get(path)]
    return [f"{path}: {was.get(path)} -> {now.get(path)}" for path in changed if path not in MAY_CHANGE]


def last_state(run: Path) -> dict[str, Any]:
    """The content of a run's `last.pt`.

    Raises:
        CheckpointError: there is none, or it is damaged; says what else there is.
    """
    path, best = run / "last.pt", run / "best.pt"
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; the run ended before its first one, so start it anew")
    try:
        content = load_checkpoint(path)
    except CheckpointError as error:
        with contextlib.suppress(CheckpointError):
            epoch = load_checkpoint(best)["epoch"]
            error = CheckpointError(
                f"{error}; the newest whole checkpoint is {best}, epoch {epoch}, which has no optimizer: "
                f"train.py --config {run / 'config.yaml'} --set init.path={best} starts a new run from it"
            )
        raise error from None
    if not isinstance(content.get("training"), dict):
        raise CheckpointError(f"{path}: holds no state of training to go on from")
    return content


def go_on(trainer: Trainer, content: Mapping[str, Any]) -> None:
    """Put the content of `last.pt` into a new trainer, and the run folder into the state it had then.

    Raises:
        CheckpointError: it is of another model.
    """
    path = trainer.run / "last.pt"
    try:
        load_state(trainer.task, content["model"], path)
        trainer.load_state_dict(content["training"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its state of training is not what this version writes ({type(error).__name__}: {error}); "
            f"init.path={path} starts a new run from its weights"
        ) from None
    if rank():
        return
    metrics = trainer.run / "metrics.jsonl"
    temporary = metrics.with_name(".metrics.jsonl.tmp")
    temporary.write_text("")
    for record in trainer.history:  # a line more may have been written after the checkpoint, or one less
        append_json_line(temporary, record)
    os.replace(temporary, metrics)
    (trainer.run / "config.yaml").write_text(to_yaml(trainer.config), encoding="utf-8")
    LOGGER.info("going on with epoch %d after %d of its batches", trainer.epoch, trainer.batches)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all that is no mapping."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
