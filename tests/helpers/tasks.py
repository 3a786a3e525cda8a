"""Small tasks with their batches and loaders."""

from pathlib import Path

import torch

from configs.schema import Config, load_config
from datasets.annotations import load_annotations
from datasets.loaders import TrainLoader, build_train_loader, data_tokenizer
from model.build import build_encoder, build_task, build_teacher, needs_teacher
from model.encoders import Encoder
from model.task import AnyTeacher, RetrievalTask
from tests.helpers.configs import ROOT, TINY, tiny_config
from utils.batch import Batch

IRRA = ROOT / "configs/irra.yaml"
VOCAB = 1024


def tiny_task(*overrides: str, config=IRRA) -> RetrievalTask:
    """Task of a shipped config at tiny size, with fixed weights."""
    torch.manual_seed(0)
    return build_task(load_config(config, [*TINY, *overrides]), num_pids=5, teacher=False)


def tiny_batch(task: RetrievalTask, size: int = 4, length: int = 10) -> Batch:
    """Fixed random batch with the fields that the task reads."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB - 3, (size, length), generator=generator)
    ids[:, 0], ids[:, -1] = VOCAB - 2, VOCAB - 1
    labels = torch.zeros_like(ids)
    labels[:, 2] = ids[:, 2]
    masked = torch.where(labels != 0, VOCAB - 3, ids)
    batch = {
        "images": torch.randn(size, 3, 64, 32, generator=generator),
        "pids": torch.tensor([0, 1, 1, 4])[:size],
        "caption_ids": ids,
        "mlm_ids": masked,
        "mlm_labels": labels,
        "mlm_positions": labels.flatten().nonzero().squeeze(1),
    }
    return {name: value for name, value in batch.items() if name in task.inputs}


def with_teacher(task: RetrievalTask, teacher: AnyTeacher) -> RetrievalTask:
    """The task with another teacher."""
    return RetrievalTask(task.encoder, dict(task.named_objectives()), teacher)


def tiny_encoder(*overrides: str, pretrained: bool = True) -> Encoder:
    """Encoder of the baseline at tiny size."""
    return build_encoder(load_config(ROOT / "configs/baseline.yaml", [*TINY, *overrides]), pretrained=pretrained)


def task_of(config: Config, seed: int = 0) -> RetrievalTask:
    """Task for the eight training identities of the rendered data, without teacher."""
    torch.manual_seed(seed)
    return build_task(config, num_pids=8, teacher=False)


def loader_of(config: Config, task: RetrievalTask, *more: str) -> TrainLoader:
    """Loader of the rendered training pairs with the fields that the task reads, `index`, and `more`."""
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024, kinds=task.encoder.tokenizers)
    return build_train_loader(
        config.data,
        annotations,
        tokenizer,
        fields=task.inputs | {"index", *more},
        full_text=task.full_text,
        seed=config.train.seed,
        pin_memory=False,
    )


def flagged_loader_of(config: Config, task: RetrievalTask) -> TrainLoader:
    """The same loader, with the `clean` flag of each pair."""
    return loader_of(config, task, "clean")


def stir(module: torch.nn.Module) -> None:
    """Perturb the parameters, since fusion is the identity at initialisation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def student_config(root: Path, run: Path, *overrides: str) -> Config:
    """Config of the distilled student of a teacher's run."""
    return tiny_config("lcr2s", root, f"teacher.checkpoint={run / 'last.pt'}", *overrides)


def student_of(config: Config) -> RetrievalTask:
    """Student with its teacher attached."""
    assert needs_teacher(config)
    return with_teacher(task_of(config), build_teacher(config))
