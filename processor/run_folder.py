"""The folder of a run: creation, its one writer, its config and records, advice after an interruption."""

import contextlib
import hashlib
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from configs.schema import Config, load_config, parse_config
from datasets.annotations import Annotations
from datasets.noise import Index
from model.checkpoints.files import weights_file
from processor.trainer import Trainer
from utils.checkpoint import load_checkpoint
from utils.config import to_yaml
from utils.distributed import local_processes, rank, world_size
from utils.errors import CheckpointError, ConfigError, DataError, first_line
from utils.files import locked, write_text
from utils.integrity import file_hash
from utils.launcher import env_rank
from utils.logger import LOGGER, start_logging
from utils.paths import in_full
from utils.yaml_text import read_yaml


def one_writer(run: Path) -> contextlib.AbstractContextManager[None]:
    """Lock a run folder in the first process; raises `ConfigError` if another run writes to it."""
    return contextlib.nullcontext() if env_rank() else locked(run)


@contextlib.contextmanager
def new_run_folder(config: Config, run: Path | None) -> Iterator[Path]:
    """Create and lock the folder of a new run. Processes other than the first do neither.

    Args:
        config: resolved config of the run.
        run: folder to create; None names it by data set, time and config.
    """
    if rank():
        yield run or Path()
    else:
        run = create_run_folder(config, run)
        with locked(run):
            yield run


def create_run_folder(config: Config, run: Path | None) -> Path:
    """Create the folder of a new run with its config; automatic names never collide.

    Raises:
        ConfigError: the folder that `run` names exists already, or cannot be created.
    """
    try:
        if run is None:
            run = _named_folder(config)
        else:
            run.mkdir(parents=True)
        try:
            write_text(run / "config.yaml", to_yaml(config))
        except OSError:
            run.rmdir()
            raise
    except FileExistsError:
        raise ConfigError(f"{run}: run folder exists already; name another with --run") from None
    except OSError as error:
        where = run or config.train.output
        raise ConfigError(f"{where}: cannot create the run folder ({error}); name another with --run") from None
    return run


def _named_folder(config: Config) -> Path:
    """Create a folder named by data set, time and config, with a number behind the name from the second one on."""
    name = f"{time.strftime('%Y%m%d_%H%M%S')}_{config.name}"
    first = run = Path(config.train.output) / config.data.dataset / name
    number = 1
    while True:
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            number += 1
            run = first.with_name(f"{name}_{number}")
        else:
            return run


def open_log(run: Path) -> None:
    """Start `train.log` in the first process, and silence the others."""
    if rank():
        LOGGER.disabled = True
    else:
        start_logging(run / "train.log")


def input_hashes(config: Config, annotations: Annotations, noise: Index | None) -> dict[str, str]:
    """SHA-256 of the files that a run is trained on, by name and path. Images are left out, for they take too long."""
    hashes = {} if annotations.file is None else {"annotations": file_hash(annotations.file)}
    if config.teacher.checkpoint is not None and config.losses:
        with contextlib.suppress(OSError, CheckpointError):  # a config may name a teacher that no loss needs
            hashes["teacher"] = file_hash(weights_file(config.teacher.checkpoint))
    if noise is not None:
        hashes["noise"] = hashlib.sha256(np.ascontiguousarray(noise).tobytes()).hexdigest()
    return hashes


def began(run: Path) -> bool:
    """True if a run folder has results or checkpoints, so that starting it from the beginning would lose work."""
    return any((run / name).exists() for name in ("last.pt", "best.pt", "best_ema.pt", "metrics.jsonl"))


def run_config(run: Path, overrides: list[str]) -> Config:
    """The config of a run folder with overrides applied.

    Raises:
        ConfigError: it is not a run folder, or its config is damaged and there is no checkpoint with a copy.
    """
    path = run / "config.yaml"
    if not (path.exists() or began(run)):
        raise ConfigError(f"{in_full(run)}: not a run folder (it has no config.yaml)")
    if problem := _damage(path):
        text = _config_of_checkpoint(run)
        if text is None:
            raise ConfigError(f"{path}: damaged ({problem}), and no checkpoint holds a copy; write it again")
        if env_rank() == 0:
            LOGGER.warning("%s: damaged (%s); using the config inside the checkpoint", path, problem)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / path.name
            path.write_text(text, encoding="utf-8")
            return load_config(path, overrides)
    return load_config(path, overrides)


def _damage(path: Path) -> str | None:
    """Problem of a file that cannot be read as a config; None for one with settings, even if they are wrong."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return first_line(error)
    return None if isinstance(content, dict) and "model" in content else "settings are missing"


def _config_of_checkpoint(run: Path) -> str | None:
    """Config as YAML text from an intact checkpoint of the run."""
    for name in ("last.pt", "best.pt"):
        with contextlib.suppress(CheckpointError, ConfigError):
            text = load_checkpoint(run / name).get("config")
            if isinstance(text, str):
                parse_config(text)
                return text
    return None


def finished(folder: Path) -> bool:
    """True if a run folder holds all epochs of its config."""
    if not (folder / "metrics.jsonl").is_file():
        return False
    return len(records(folder)) == run_config(folder, []).train.epochs


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's epochs; raises `DataError` if metrics.jsonl is damaged."""
    path = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); restore it with python train.py --resume {folder}") from None


def resume_command(run: Path) -> str:
    """Command line that resumes a run with as many processes on this machine."""
    program = "python" if world_size() == 1 else f"torchrun --nproc_per_node={local_processes()}"
    return f"{program} train.py --resume {shlex.quote(str(run))}"


@contextlib.contextmanager
def resumable(trainer: Trainer, *, fresh: bool) -> Iterator[None]:
    """Note on an exception of the body how to resume; remove the folder of a run that had not begun.

    Args:
        trainer: trainer of the run.
        fresh: True if this process created the run folder.
    """
    try:
        yield
    except BaseException as error:
        if rank() == 0 and fresh and trainer.step == 0 and not began(trainer.run):
            start_logging()  # closes the log file
            shutil.rmtree(trainer.run, ignore_errors=True)
        elif rank() == 0:
            error.add_note(f"resume with: {resume_command(trainer.run)}")
        raise
