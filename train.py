"""Train a method: `python train.py --config configs/irra.yaml --set train.epochs=30 losses.mlm=null`."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Config, load_config
from datasets.annotations import ADAPTERS, Annotations, load_annotations
from datasets.loaders import EvalLoaders, TrainLoader, build_eval_loaders, build_train_loader, data_tokenizer
from datasets.noise import Index
from datasets.text.levels import check_levels
from datasets.transforms import build_transform
from model.build import build_task, build_teacher, needs_teacher, resolve
from model.checkpoints.formats import FORMATS
from model.load import LoadReport, load_init
from model.task import RetrievalTask
from model.teacher import CachedTeacher
from processor.resume import check_changes, go_on, last_state, run_config
from processor.teacher_cache import fill_cache
from processor.trainer import Trainer
from solver.optimizer import build_optimizer
from utils.config import to_yaml
from utils.distributed import describe_device, end_processes, first_alone, rank, start_processes
from utils.errors import ConfigError, DataError
from utils.exit import exit_on_user_error
from utils.logger import LOGGER, start_logging
from utils.seed import seed_everything, seed_process


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a text-to-image person retrieval method from a YAML config.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="YAML file, for instance configs/irra.yaml")
    what.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config"
    )
    parser.add_argument(  # torchrun takes --run for its own
        *("--run", "--run-folder"),
        type=Path,
        help="run folder to make; default: <train.output>/<data set>/<time>_<name>",
    )
    parser.add_argument("--print-config", action="store_true", help="check everything, print the full config and stop")
    parser.add_argument("--force", action="store_true", help="with --resume: change what makes it another experiment")
    arguments = parser.parse_args()
    with exit_on_user_error():
        if arguments.resume:
            if arguments.run or arguments.print_config:
                raise ConfigError("--run, --print-config: belong to --config; --resume goes on in the run's own folder")
            resume(arguments.resume, arguments.set, force=arguments.force)
        elif arguments.force:
            raise ConfigError("--force: belongs to --resume")
        else:
            config = resolve(load_config(arguments.config, arguments.set))
            if arguments.print_config:
                check(config)
                print(to_yaml(config), end="")
            else:
                train(config, arguments.run)
        end_processes()


def check(config: Config) -> None:
    """Raise `ConfigError` for what can be known to be wrong without data, weights or a GPU."""
    ADAPTERS.get(config.data.dataset, "data.dataset")
    build_transform(config.data, train=True)
    check_levels(config.data.text_levels)
    if config.init.format is not None:
        FORMATS.get(config.init.format, "init.format")
    needs_teacher(config)
    build_optimizer(config.solver, build_task(config, num_pids=2, pretrained=False).named_parameters())


def resume(run: Path, overrides: list[str], *, force: bool = False) -> Path:
    """Go on with an interrupted run as if it had not been; returns its folder."""
    before, config = (resolve(run_config(run, layers)) for layers in ([], overrides))
    check_changes(run, before, config, force=force)
    return train(config, run, checkpoint=last_state(run))


def train(config: Config, run: Path | None = None, *, checkpoint: Mapping[str, Any] | None = None) -> Path:
    """Everything in order, from annotations to the final table; returns the run folder.

    Args:
        run: the folder to make; None: named by data set, time and config.
        checkpoint: the content of the `last.pt` in `run`, which is there already, to go on from.
    """
    distils = needs_teacher(config)
    seed_everything(config.train.seed)
    device = start_processes()
    with first_alone():  # the synthetic data set is rendered on first use
        annotations = load_annotations(config.data.dataset, config.data.root, val_ids=config.val_ids)
    if config.eval.select_on == "val" and not annotations.val:
        raise DataError(
            f"{annotations.folder}: has no val split to select on; data.val_ids=200 makes one of 200 identities of "
            "train, eval.select_on=test is the papers' way"
        )
    task, loaded = prepare_task(config, len(annotations.train_labels), distils=distils, fresh=checkpoint is None)
    task.to(device)
    loader, evaluation = prepare_loaders(config, annotations, task, pin_memory=device.type != "cpu")
    optimizer = build_optimizer(config.solver, task.named_parameters())
    if config.train.compile:
        task.encoder.compile_towers()
    if isinstance(task.teacher, CachedTeacher):
        fill_cache(task.teacher, loader.pairs, config, device)

    if rank() == 0:
        run = make_run_folder(config, run) if checkpoint is None or run is None else run
        start_logging(run / "train.log")
    else:
        run = run or Path()
        LOGGER.disabled = True  # the first process speaks for all
    size = sum(parameter.numel() for parameter in task.parameters()) / 1e6
    LOGGER.info("%s on %s, %.2f M parameters, run folder %s", config.name, describe_device(device), size, run)
    LOGGER.info("%s\n%s", config.data.dataset, annotations.table())
    for note in (*annotations.notes(), *task.encoder.notes, *([loaded.table()] if loaded else [])):
        LOGGER.info("%s", note)
    if loader.pairs.noise is not None and rank() == 0:
        record_noise(loader.pairs.noise, run)
    trainer = Trainer(task, optimizer, loader, evaluation, config, run, device)
    seed_process(config.train.seed)
    if checkpoint is not None:
        go_on(trainer, checkpoint)
    trainer.fit()
    LOGGER.info("the run lies in %s; evaluate it again with: python test.py --run %s", run, run)
    return run


def prepare_task(
    config: Config, num_pids: int, *, distils: bool, fresh: bool
) -> tuple[RetrievalTask, LoadReport | None]:
    """The task, with its teacher, and what was loaded from `init`; not `fresh`: all weights come from a checkpoint."""
    task = build_task(config, num_pids, pretrained=fresh)
    loaded = load_init(task, config.init) if fresh else None
    if distils:
        teacher = build_teacher(config)
        task.learn_from(CachedTeacher(teacher) if config.teacher.cache else teacher)
    return task, loaded


def prepare_loaders(
    config: Config, annotations: Annotations, task: RetrievalTask, *, pin_memory: bool
) -> tuple[TrainLoader, dict[str, EvalLoaders]]:
    """Training batches with what the task asks for, and each split that there is to evaluate on."""
    encoder = task.encoder
    tokenizer = data_tokenizer(config.data, annotations.folder, most=encoder.vocab_size, kinds=encoder.tokenizers)
    train_loader = build_train_loader(
        config.data,
        annotations,
        tokenizer,
        fields=task.inputs | {"index"} | ({"clean"} if config.data.noise_rate else set()),
        full_text=task.full_text,
        seed=config.train.seed,
        pin_memory=pin_memory,
        parts=config.train.accumulate,
    )
    evaluation = {
        split: build_eval_loaders(
            config.data, annotations.split(split), tokenizer, batch_size=config.eval.batch_size, pin_memory=pin_memory
        )
        for split in ("val", "test")
        if annotations.split(split)
    }
    return train_loader, evaluation


def record_noise(noise: Index, run: Path) -> None:
    """Keep whose caption each training image has, `noise.npy` in the run folder."""
    np.save(run / "noise.npy", noise)
    moved = int((noise != np.arange(len(noise))).sum())
    LOGGER.info("%d of %d training captions are another pair's, noise.npy says whose", moved, len(noise))


def make_run_folder(config: Config, run: Path | None) -> Path:
    """Make the folder of a new run and put the config in it; raises `ConfigError` if there is one already."""
    if run is None:
        run = Path(config.train.output) / config.data.dataset / f"{time.strftime('%Y%m%d_%H%M%S')}_{config.name}"
    try:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except FileExistsError:
        raise ConfigError(f"{run}: this run folder is there already; name another with --run") from None
    except OSError as error:
        raise ConfigError(f"{run}: cannot make this run folder ({error})") from None
    return run


if __name__ == "__main__":
    main()
