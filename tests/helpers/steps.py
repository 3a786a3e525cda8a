"""One training step in float64: its loss, gradients and logged terms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Config, load_config
from datasets.annotations import load_annotations
from datasets.loaders import build_train_loader, data_tokenizer
from model.build import build_encoder, build_task
from model.objectives import PairObjective
from model.task import RetrievalTask
from model.teacher import Teacher
from processor.engine import Engine
from tests.helpers.configs import ROOT, TINY
from tests.helpers.tasks import with_teacher
from utils.batch import MicroBatch
from utils.distributed import mean_over_processes


def exact_task(config: Config) -> RetrievalTask:
    """Task in float64 with perturbed weights, a teacher if a loss needs one, and a clean mask."""
    torch.manual_seed(0)
    task = build_task(config, num_pids=8, teacher=False)
    if any("distill" in name for name in config.losses) and not task.encoder.teaches_itself:
        teacher = load_config(ROOT / "configs/lcr2s_teacher.yaml", TINY)
        task = with_teacher(task, Teacher(build_encoder(teacher)))
    with torch.no_grad():
        for module in (task, *filter(None, [task.teacher])):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for _, objective in task.named_objectives():
        if isinstance(objective, PairObjective) and objective.fit is not None:
            objective.clean_mask = torch.arange(32) % 3 != 0
    return task.double().eval()  # no dropout or masking, which each process draws on its own


def micro_batches_of(config: Config, task: RetrievalTask, number: int) -> list[MicroBatch]:
    """Micro-batches of batch `number` of the first epoch, in float64."""
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024, kinds=task.encoder.tokenizers)
    loader = build_train_loader(
        config.data,
        annotations,
        tokenizer,
        fields=task.inputs | {"index", "clean"},
        full_text=task.full_text,
        seed=1,
        pin_memory=False,
        micro_batches=config.train.accumulate,
    )
    on_cpu = [micro_batch.to(torch.device("cpu")) for micro_batch in list(loader.epoch(1))[number]]
    return [
        MicroBatch({name: v.double() if v.is_floating_point() else v for name, v in fields.items()}, shard)
        for fields, shard in on_cpu
    ]


def step_of(config: Config, number: int) -> tuple[float, dict[str, Any], list[float]]:
    """Loss of batch `number`, all gradients, and the logged terms in alphabetical order."""
    task = exact_task(config)
    engine = Engine(task, config, torch.device("cpu"))
    total, terms = engine.backward(micro_batches_of(config, task, number))
    gradients = {name: p.grad.numpy() for name, p in task.named_parameters() if p.grad is not None}
    values = [mean_over_processes(value) for _, value in sorted(terms.items()) if isinstance(value, Tensor)]
    return float(mean_over_processes(total)), gradients, [float(value) for value in values]


def same_step(one: tuple[float, dict[str, Any], list[float]], other: tuple[float, dict[str, Any], list[float]]) -> None:
    """Assert that two results of `step_of` agree."""
    (total, gradients, terms), (expected, others, other_terms) = one, other
    assert total == pytest.approx(expected, rel=1e-10)
    assert terms == pytest.approx(other_terms, rel=1e-10)
    assert set(gradients) == set(others)
    for name, gradient in others.items():
        assert abs(gradients[name] - gradient).max() <= 1e-10 * max(abs(gradient).max(), 1e-3), name


def take_gradients(task: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, which are then cleared."""
    found = {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}
    task.zero_grad()
    return found
