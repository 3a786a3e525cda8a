"""Train a method: `python train.py --config configs/irra.yaml --set train.epochs=30 losses.mlm=null`."""

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np
import torch

from configs.schema import Config, load_config
from datasets.annotations import ADAPTERS, SPLITS, Annotations, load_annotations
from datasets.loaders import (
    EvalLoaders,
    TrainLoader,
    build_eval_loaders,
    build_train_loader,
    data_tokenizer,
    worker_notes,
)
from datasets.noise import Index
from datasets.presence import require_images
from datasets.text.levels import check_levels
from datasets.transforms import build_transform
from model.build import build_task, needs_teacher
from model.checkpoints.formats import FORMATS
from model.task import RetrievalTask
from model.teacher import CachedTeacher
from processor.help import config_help
from processor.resolve import resolve
from processor.resume import Resumption, prepare, restore
from processor.run_folder import input_hashes, new_run_folder, one_writer, open_log, resumable, resume_command
from processor.teacher_cache import fill_cache
from processor.trainer import Trainer
from solver.optimizer import build_optimizer
from solver.schedule import schedule_notes
from utils.config import to_yaml
from utils.distributed import describe_device, end_processes, first_alone, rank, start_processes
from utils.errors import ConfigError, DataError
from utils.exit import exit_on_user_error
from utils.files import write_bytes
from utils.launcher import adopt_launcher
from utils.logger import LOGGER
from utils.paths import expand, in_full
from utils.seed import seed_everything, seed_process
from utils.version import VERSION


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a text-to-image person retrieval method from a YAML config.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--config", type=expand, help="YAML file, for instance configs/irra.yaml")
    action.add_argument("--resume", type=expand, metavar="RUN", help="resume the run in this folder")
    action.add_argument(
        "--help-config", nargs="?", const="", metavar="KEY", help="describe the config's options and stop"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config"
    )
    parser.add_argument(  # torchrun takes --run for itself
        *("--run", "--run-folder"),
        type=expand,
        help="run folder to create; default: <train.output>/<data set>/<time>_<name>",
    )
    parser.add_argument("--print-config", action="store_true", help="check the config, print all options and stop")
    parser.add_argument(
        "--force", action="store_true", help="with --resume: allow changes that make another experiment"
    )
    with exit_on_user_error():
        arguments = parser.parse_args()
        adopt_launcher()
        if arguments.help_config is not None:
            print(config_help(arguments.help_config))
        elif arguments.resume:
            if arguments.run or arguments.print_config:
                raise ConfigError("--resume: continues in the run's folder; drop --run and --print-config")
            resume(arguments.resume, arguments.set, force=arguments.force)
        elif arguments.force:
            raise ConfigError("--force: needs --resume")
        else:
            config = resolve(load_config(arguments.config, arguments.set))
            if arguments.print_config:
                check(config)
                print(to_yaml(config), end="")
            else:
                train(config, arguments.run)
        end_processes()


def check(config: Config) -> None:
    """Raise `ConfigError` for every mistake visible without data, weights or a GPU."""
    ADAPTERS.get(config.data.dataset, "data.dataset")
    build_transform(config.data, train=True)
    check_levels(config.data.text_levels)
    if config.init.format is not None:
        FORMATS.get(config.init.format, "init.format")
    needs_teacher(config)
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
    if config.eval.select_on == "val" and not annotations.val:
        raise DataError(
            f"{annotations.folder}: has no val split to select on; set data.val_ids=200 to hold out 200 training "
            "identities, or eval.select_on=test as the papers do"
        )
    require_images(annotations, SPLITS, config.data)
    resumed = resumption is not None and bool(resumption.content)
    task = build_task(config, len(annotations.train_labels), weights=not resumed, teacher=distils)
    task.to(device)
    loader, evaluation = build_loaders(config, annotations, task, device)
    optimizer = build_optimizer(config.solver, task.named_parameters())
    if config.train.compile:
        task.encoder.compile_towers()
    if isinstance(task.teacher, CachedTeacher):
        fill_cache(task.teacher, loader.pairs, config, device)

    with contextlib.ExitStack() as stack:
        if run is None or resumption is None:
            run = stack.enter_context(new_run_folder(config, run))
        open_log(run)
        inputs = input_hashes(config, annotations, loader.pairs.noise)
        trainer = Trainer(task, optimizer, loader, evaluation, config, run, device, inputs)
        stack.enter_context(resumable(trainer, fresh=resumption is None))
        size = sum(parameter.numel() for parameter in task.parameters()) / 1e6
        LOGGER.info("version %s, %s on %s", VERSION, config.name, describe_device(device))
        LOGGER.info("%.2f M parameters, run folder %s", size, run)
        LOGGER.info("%s\n%s", config.data.dataset, annotations.table())
        notes = [*annotations.notes(), *task.notes, *worker_notes(config.data)]
        notes += schedule_notes(config.solver.schedule, config.train.epochs)
        notes += ["solver.lr: the rate is 0, so the weights do not change"] if config.solver.lr == 0 else []
        for note in (*notes, *(resumption.notes if resumption else ())):
            LOGGER.info("%s", note)
        if loader.pairs.noise is not None and rank() == 0:
            save_noise(loader.pairs.noise, run)
        seed_process(config.train.seed)
        if resumption is not None and resumed:
            restore(trainer, resumption.content, force=resumption.force)
        LOGGER.info("if it is interrupted, resume with: %s", resume_command(run))
        trainer.fit()
        LOGGER.info("run folder: %s; evaluate it with: python test.py --run %s", run, run)
    return run


def build_loaders(
    config: Config, annotations: Annotations, task: RetrievalTask, device: torch.device
) -> tuple[TrainLoader, dict[str, EvalLoaders]]:
    """Training batches with the fields of `task.inputs`, and loaders of each evaluation split."""
    encoder, pin_memory = task.encoder, device.type != "cpu"
    tokenizer = data_tokenizer(config.data, annotations.folder, most=encoder.vocab_size, kinds=encoder.tokenizers)
    train_loader = build_train_loader(
        config.data,
        annotations,
        tokenizer,
        fields=task.inputs | {"index"} | ({"clean"} if config.data.noise_rate else set()),
        full_text=task.full_text,
        seed=config.train.seed,
        pin_memory=pin_memory,
        micro_batches=config.train.accumulate,
    )
    evaluation = {
        split: build_eval_loaders(
            config.data, annotations.split(split), tokenizer, batch_size=config.eval.batch_size, pin_memory=pin_memory
        )
        for split in ("val", "test")
        if annotations.split(split)
    }
    return train_loader, evaluation


def save_noise(noise: Index, run: Path) -> None:
    """Save the source pair of every training caption as `noise.npy` in the run folder."""
    content = io.BytesIO()  # into a file, NumPy writes without the error number of a full disk
    np.save(content, noise)
    write_bytes(run / "noise.npy", content.getvalue())
    moved = int((noise != np.arange(len(noise))).sum())
    LOGGER.info("noise replaced %d of %d training captions, see noise.npy", moved, len(noise))


if __name__ == "__main__":
    main()
