"""Evaluation on a simulated GPU: the host waits as often for one batch or chunk as for many."""

from pathlib import Path

import pytest
import torch

from configs.schema import load_config
from model.build import build_encoder
from model.teacher import CachedTeacher, Teacher
from processor.evaluator import embed
from processor.teacher_cache import fill_cache
from tests.helpers.configs import CONFIGS, TINY
from tests.helpers.gpu_runs import shipped_config, trainer_of
from tests.helpers.simulated_gpu import GPU, simulated_gpu
from utils.metrics import retrieval_metrics

CPU = torch.device("cpu")


def places(waits: list[str]) -> list[str]:
    """Files and lines of host synchronisations."""
    return [wait.partition(" in ")[0] for wait in waits]


@pytest.mark.parametrize("name", ["irra", "ivt", "rde"])
def test_encoding_does_not_wait_per_batch(name: str, root: Path, tmp_path: Path) -> None:
    waits = []
    for size in (2, 64):
        with simulated_gpu() as gpu:
            trainer = trainer_of(shipped_config(name, root, f"eval.batch_size={size}"), GPU, tmp_path)
            before = len(gpu.syncs)
            embed(trainer.task.encoder, trainer.evaluation["test"], GPU, "bf16")
            waits.append(places(gpu.syncs[before:]))
    assert waits[0] == waits[1]


def ranked(queries: int, items: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors of queries and gallery, and the pids of both, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(rows, 8, generator=generator) for rows in (queries, items))
    return query, gallery, torch.arange(queries) % 7, torch.arange(items) % 9


def test_scores_on_the_gpu_are_ranked_as_on_the_cpu() -> None:
    query, gallery, query_pids, gallery_pids = ranked(20, 30)
    scores = (query @ gallery.T).round()  # with ties
    expected = retrieval_metrics(scores, query_pids, gallery_pids)
    with simulated_gpu():
        assert retrieval_metrics(scores.to(GPU), query_pids, gallery_pids) == expected


def test_filling_the_teacher_cache_does_not_wait_per_batch(root: Path, tmp_path: Path) -> None:
    tables, waits = [], []
    for device, size in ((CPU, 64), (GPU, 64), (GPU, 4)):
        config = shipped_config("baseline", root, f"eval.batch_size={size}")
        pairs = trainer_of(config, CPU, tmp_path).train.pairs
        torch.manual_seed(0)
        teacher = CachedTeacher(Teacher(build_encoder(load_config(CONFIGS / "lcr2s_teacher.yaml", TINY))))
        with simulated_gpu() as gpu:
            fill_cache(teacher, pairs, config, device)
            waits.append(places(gpu.syncs))
            tables.append((teacher.images.cpu(), teacher.captions.cpu()))
    assert waits[1] == waits[2]
    for found in tables[1:]:
        torch.testing.assert_close(found, tables[0], rtol=1e-4, atol=1e-5)
