"""Training from a config: build everything in order, check the inputs, fit."""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch

from configs.schema import Config
from datasets.annotations import ADAPTERS, SPLITS, load_annotations, require_selection
from datasets.loaders import text_notes
from datasets.noise import Index
from datasets.presence import require_images
from datasets.text.levels import check_levels
from datasets.transforms import build_transform
from datasets.workers import worker_notes
from model.build import build_task, needs_teacher
from model.checkpoints.formats import FORMATS
from model.teacher import CachedTeacher
from processor.downloads import require_downloads
from processor.engine import Engine, process_notes
from processor.inputs import build_loaders
from processor.resume import Resumption, prepare, restore
from processor.run_folder import input_hashes, new_run_folder, one_writer, open_log, resumable, resume_command
from processor.teacher_cache import fill_cache
from processor.trainer import Trainer
from solver.optimizer import build_optimizer
from solver.schedule import schedule_notes
from utils.distributed import describe_device, first_alone, rank, start_processes, unlike_devices
from utils.errors import ConfigError
from utils.files import write_bytes
from utils.logger import LOGGER
from utils.paths import in_full
from utils.seed import seed_everything, seed_process
from utils.version import VERSION


def check(config: Config) -> None:
    """Raise `ConfigError` for every mistake visible without data, weights or a GPU."""
    ADAPTERS.get(config.data.dataset, "data.dataset")
    build_transform(config.data, train=True)
    check_levels(config.data.text_levels)
    if config.init.format is not None:
        FORMATS.get(config.init.format, "init.format")
    needs_teacher(config)
    with torch.device("meta"):  # shapes without memory
        task = build_task(config, num_pids=2, weights=False, teacher=False)
    build_optimizer(config.solver, task.named_parameters())


def resume(run: Path, overrides: list[str], *, force: bool = False) -> Path:
    """Resume an interrupted run; returns its folder."""
    if not run.is_dir():
        raise ConfigError(f"{in_full(run)}: not a run folder (there is no such folder)")
    with one_writer(run):
        resumption = prepare(run, overrides, force=force)
        return train(resumption.config, run, resumption=resumption)


def train(config: Config, run: Path | None = None, *, resumption: Resumption | None = None) -> Path:
    """Train from annotations to the final table; returns the run folder.

    Args:
        config: resolved config.
        run: folder to create; None names it by data set, time and config.
        resumption: state of the existing folder `run`, to resume from.
    """
    distils = needs_teacher(config)  # before anything takes time
    seed_everything(config.train.seed)
    device = start_processes(config.train.timeout)
    with first_alone():  # the first use renders the synthetic data set
        annotations = load_annotations(config.data.dataset, config.data.root, val_ids=config.carved_val_ids)
    require_selection(config, annotations)
    require_images(annotations, SPLITS, config.data)
    resumed = resumption is not None and bool(resumption.content)
    require_downloads(config, weights=not resumed)
    task = build_task(config, len(annotations.train_labels), weights=not resumed, teacher=distils)
    engine = Engine(task, config, device)
    loader, evaluation = build_loaders(config, annotations, task, device)
    if config.train.compile:
        task.encoder.compile_towers()
    if isinstance(task.teacher, CachedTeacher):
        fill_cache(task.teacher, loader.pairs, config, device)

    with contextlib.ExitStack() as stack:
        if run is None or resumption is None:
            run = stack.enter_context(new_run_folder(config, run))
        open_log(run)
        inputs = input_hashes(config, annotations, loader.pairs.noise)
        trainer = Trainer(engine, loader, evaluation, run, inputs)
        stack.enter_context(resumable(trainer, fresh=resumption is None))
        size = sum(parameter.numel() for parameter in task.parameters()) / 1e6
        LOGGER.info("version %s, %s on %s", VERSION, config.name, describe_device(device))
        LOGGER.info("%.2f M parameters, run folder %s", size, run)
        LOGGER.info("%s\n%s", config.data.dataset, annotations.table())
        notes = [*annotations.notes(), *task.notes, *worker_notes(config.data), *process_notes(config)]
        notes += text_notes(config.data, loader.pairs.tokenizer, annotations.train, "training")
        notes += schedule_notes(config.solver.schedule, config.train.epochs)
        notes += ["solver.lr: the rate is 0, so the weights do not change"] if config.solver.lr == 0 else []
        for note in (*notes, *(resumption.notes if resumption else ())):
            LOGGER.info("%s", note)
        if kinds := unlike_devices(device):
            LOGGER.warning("devices of different kinds, and the slowest sets the pace: %s", kinds)
        if loader.pairs.noise is not None and rank() == 0:
            save_noise(loader.pairs.noise, run)
        seed_process(config.train.seed)
        if resumption is not None and resumed:
            restore(trainer, resumption.content, force=resumption.force)
        LOGGER.info("if it is interrupted, resume with: %s", resume_command(run))
        trainer.fit()
        LOGGER.info("run folder: %s; evaluate it with: python test.py --run %s", run, run)
    return run


def save_noise(noise: Index, run: Path) -> None:
    """Save the source pair of every training caption as `noise.npy` in the run folder."""
    content = io.BytesIO()  # into a file, NumPy writes without the error number of a full disk
    np.save(content, noise)
    write_bytes(run / "noise.npy", content.getvalue())
    moved = int((noise != np.arange(len(noise))).sum())
    LOGGER.info("noise replaced %d of %d training captions, see noise.npy", moved, len(noise))
