"""Resuming a run: changes of its settings, the checkpoint, the state of the run folder."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config, parse_config
from model.encoders import ENCODERS
from processor.resolve import resolve
from processor.run_folder import began, run_config
from processor.trainer import Trainer
from processor.training_state import MOST, check_training_state, shown
from solver.schedule import lr_at
from utils.checkpoint import load_checkpoint, load_state
from utils.config import leaves, to_plain, to_yaml
from utils.distributed import rank
from utils.errors import CheckpointError, ConfigError, first_line
from utils.files import write_text
from utils.logger import LOGGER, json_line
from utils.options import option_of, schema_of, walk
from utils.paths import in_full


@dataclass(frozen=True)
class Resumption:
    """State to resume a run from."""

    config: Config  # resolved, with the overrides
    content: Mapping[str, Any]  # of last.pt; empty if the run ended before its first checkpoint
    notes: list[str]  # remarks for the log
    force: bool  # allow changes that make another experiment


def prepare(run: Path, overrides: list[str], *, force: bool) -> Resumption:
    """Read and check everything that a resume needs; changes nothing.

    Args:
        run: run folder, locked by this process.
        overrides: changes of its config.
        force: allow changes that make another experiment.

    Raises:
        ConfigError: it is not a run folder, or the changes make another experiment.
        CheckpointError: `last.pt` is missing or damaged.
    """
    config = resolve(run_config(run, overrides))
    content = last_state(run) if began(run) else {}
    if not content:
        check_changes(run, resolve(run_config(run, [])), config, force=force)
        return Resumption(config, {}, ["the run ended before its first checkpoint: starting from the beginning"], force)
    text = content.get("config")
    before = resolve(parse_config(text) if isinstance(text, str) else run_config(run, []))
    check_changes(run, before, config, force=force)
    return Resumption(config, content, check_length(before, config, content["training"]), force)


def check_length(before: Config, config: Config, state: Mapping[str, Any]) -> list[str]:
    """Remarks on what another number of epochs does to the learning rate; raises `ConfigError` if they are over.

    Args:
        before: resolved config that the checkpoint was written with.
        config: resolved config to resume with.
        state: training state of the checkpoint.
    """
    old, new, epoch = before.train.epochs, config.train.epochs, int(state["epoch"])
    if new == old:
        return []
    if new < epoch:
        raise ConfigError(
            f"train.epochs: must be more than the {epoch - 1} epochs that the run has completed, got {new}"
        )

    def rate(epoch: int, one: Config) -> float:
        return lr_at(epoch, one.solver.lr, epochs=one.train.epochs, **one.solver.schedule)

    planned = f", planned before: {rate(epoch, before):.2e}" if epoch <= old else ""
    done = f"epoch {epoch - 1} had {rate(epoch - 1, before):.2e}, " if epoch > 1 else ""
    return [
        f"train.epochs: {old} -> {new}, and the schedule follows the new length; learning rate: {done}"
        f"epoch {epoch} has {rate(epoch, config):.2e}{planned}"
    ]


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
            epoch = load_checkpoint(best).get("epoch", "unknown")
            error = CheckpointError(
                f"{error}; the newest intact checkpoint is {best} (epoch {epoch}, without optimizer): "
                f"train.py --config {run / 'config.yaml'} --set init.path={best} starts a new run from it"
            )
        raise error from None
    state = content.get("training")
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: has no training state to resume from; init.path={path} starts a new run from it"
        )
    epoch = state.get("epoch")
    if type(epoch) is not int or not 0 < epoch < MOST:
        raise misfit(path, f"epoch: must be a count from 1, got {shown(epoch)}")
    return content


def misfit(path: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that cannot be resumed from, although its weights may be fine."""
    return CheckpointError(
        f"{path}: its training state does not fit this version ({reason}); init.path={path} starts a new run from its "
        "weights"
    )


def check_inputs(trainer: Trainer, content: Mapping[str, Any], *, force: bool) -> None:
    """Raise `ConfigError` if the run was trained on other annotations, noise or another teacher, unless forced."""
    inputs = trainer.checkpoints.inputs
    changed = [name for name, value in content.get("inputs", {}).items() if inputs.get(name, value) != value]
    if changed and not force:
        raise ConfigError(
            f"{trainer.run}: the content of these files has changed since the run began: {', '.join(changed)}; put the "
            "old files back, start a new run, or add --force"
        )


def restore(trainer: Trainer, content: Mapping[str, Any], *, force: bool = False) -> None:
    """Load the content of `last.pt` into a new trainer, and reset the run folder to the state of that checkpoint.

    Raises:
        CheckpointError: it belongs to another model or version.
        ConfigError: as `check_inputs`.
    """
    path = trainer.run / "last.pt"
    try:
        check_inputs(trainer, content, force=force)
        check_training_state(content, trainer)
        load_state(trainer.task, content["model"], path)
        trainer.load_state_dict(content["training"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise misfit(path, reason) from None
    if rank():
        return
    # A kill may leave one line more or less than the checkpoint has.
    write_text(trainer.run / "metrics.jsonl", "".join(map(json_line, trainer.history)))
    write_text(trainer.run / "config.yaml", to_yaml(trainer.config))
    LOGGER.info(
        "resuming in epoch %d after %d of its batches; steps after that checkpoint are logged a second time",
        *(trainer.epoch, trainer.batches),
    )
