"""Resuming a run: changes of its settings, the checkpoint, the state of the run folder."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import Config, load_config
from model.encoders import ENCODERS
from processor.trainer import Trainer
from utils.checkpoint import load_checkpoint, load_state
from utils.config import leaves, to_plain, to_yaml
from utils.distributed import rank
from utils.errors import CheckpointError, ConfigError
from utils.logger import LOGGER, append_json_line
from utils.options import option_of, schema_of, walk
from utils.paths import in_full


def run_config(run: Path, overrides: list[str]) -> Config:
    """The config of a run folder with overrides applied; raises `ConfigError` if it is not a run folder."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{in_full(run)}: not a run folder (it has no config.yaml)")
    return load_config(run / "config.yaml", overrides)


def check_changes(run: Path, before: Config, config: Config, *, force: bool) -> None:
    """Raise `ConfigError` if the changes make another experiment, unless forced.

    Args:
        run: run folder.
        before: resolved config that the run was started with.
        config: resolved config to resume with.
        force: allow any change.
    """
    other = other_settings(before, config)
    if other and not force:
        listed = "\n".join(f"  {line}" for line in other)
        raise ConfigError(
            f"{run}: these changes make it another experiment; start a new run, or add --force:\n{listed}"
        )


def other_settings(before: Config, config: Config) -> list[str]:
    """`path: old -> new` for every setting whose change makes another experiment; both configs are resolved."""
    was, now = (dict(leaves(to_plain(one))) for one in (before, config))
    encoder = schema_of(ENCODERS.get(config.model["name"], "model.name"))
    options = [*walk(Config), *walk(encoder, "model")]
    resumable = {path for path, field, _ in options if option_of(field).resumable}
    changed = [path for path in sorted(was.keys() | now.keys()) if was.get(path) != now.get(path)]
    return [f"{path}: {was.get(path)} -> {now.get(path)}" for path in changed if path not in resumable]


def last_state(run: Path) -> dict[str, Any]:
    """The content of a run's `last.pt`.

    Raises:
        CheckpointError: it is missing or damaged; the message names the alternatives.
    """
    path, best = run / "last.pt", run / "best.pt"
    if not path.exists():
        raise CheckpointError(
            f"{in_full(path)}: no such checkpoint, the run ended before its first one; start it again"
        )
    try:
        content = load_checkpoint(path)
    except CheckpointError as error:
        with contextlib.suppress(CheckpointError):
            epoch = load_checkpoint(best)["epoch"]
            error = CheckpointError(
                f"{error}; the newest intact checkpoint is {best} (epoch {epoch}, without optimizer): "
                f"train.py --config {run / 'config.yaml'} --set init.path={best} starts a new run from it"
            )
        raise error from None
    if not isinstance(content.get("training"), dict):
        raise CheckpointError(
            f"{path}: has no training state to resume from; init.path={path} starts a new run from it"
        )
    return content


def restore(trainer: Trainer, content: Mapping[str, Any]) -> None:
    """Load the content of `last.pt` into a new trainer, and reset the run folder to the state of that checkpoint.

    Raises:
        CheckpointError: it belongs to another model or version.
    """
    path = trainer.run / "last.pt"
    try:
        load_state(trainer.task, content["model"], path)
        trainer.load_state_dict(content["training"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its training state does not fit this version ({type(error).__name__}: {error}); "
            f"init.path={path} starts a new run from its weights"
        ) from None
    if rank():
        return
    metrics = trainer.run / "metrics.jsonl"
    temporary = metrics.with_name(".metrics.jsonl.tmp")
    temporary.write_text("")
    for record in trainer.history:  # a kill may leave one line more or less than the checkpoint has
        append_json_line(temporary, record)
    os.replace(temporary, metrics)
    (trainer.run / "config.yaml").write_text(to_yaml(trainer.config), encoding="utf-8")
    LOGGER.info("resuming in epoch %d after %d of its batches", trainer.epoch, trainer.batches)
