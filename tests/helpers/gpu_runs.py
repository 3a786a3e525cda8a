"""Runs on any device at tiny size: the trainer of a shipped config, and its first epoch."""

import re
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config, load_config
from datasets.annotations import load_annotations
from model.build import build_encoder, build_task
from model.teacher import Teacher
from processor.inputs import build_loaders
from processor.resolve import resolve
from processor.trainer import Trainer
from solver.optimizer import build_optimizer
from tests.helpers.configs import CONFIGS, METHODS, TINY, TINY_IVT
from tests.helpers.tasks import with_teacher
from utils.config import to_plain, to_yaml
from utils.signals import StopRequest

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "clip_vit_b16")  # a base without losses


def shipped_config(name: str, root: str | Path, *overrides: str) -> Config:
    """A shipped config at tiny size on the rendered data, which are one batch."""
    tiny = TINY_IVT if "ivt" in name else TINY
    more = ["data.batch_size=32", "data.num_instances=4", "init.path=null", "teacher.cache=false"]
    return resolve(
        load_config(CONFIGS / f"{name}.yaml", [*tiny, f"data.root={root}", *METHODS.get(name, []), *more, *overrides])
    )


def different_configs() -> dict[str, list[str]]:
    """Name -> shipped configs that differ from it at tiny size in numbers alone."""
    groups: dict[str, list[str]] = {}
    for name in SHIPPED:
        config = to_plain(shipped_config(name, "data"))
        code = to_yaml({key: config[key] for key in ("model", "losses")})
        groups.setdefault(re.sub(r"\d[\de.+-]*", "0", code), []).append(name)
    return {names[0]: names for names in groups.values()}


def trainer_of(config: Config, device: torch.device, run: Path) -> Trainer:
    """The trainer of a config on `device`, with fixed weights, and a teacher if its losses need one."""
    annotations = load_annotations("synthetic", config.data.root)
    torch.manual_seed(0)
    task = build_task(config, num_pids=8, teacher=False)
    if any("distill" in name for name in config.losses) and not task.encoder.teaches_itself:
        task = with_teacher(task, Teacher(build_encoder(load_config(CONFIGS / "lcr2s_teacher.yaml", TINY))))
    task.to(device)
    train, evaluation = build_loaders(config, annotations, task, device)
    optimizer = build_optimizer(config.solver, task.named_parameters())
    return Trainer(task, optimizer, train, {"test": evaluation["test"]}, config, run, device)


def train_epoch(trainer: Trainer) -> dict[str, Any]:
    """Train the first epoch; returns its record."""
    trainer.record = {"epoch": 1, **trainer._before_epoch(1)}
    with StopRequest() as request:
        return trainer._train_epoch(1, request)
