"""Compiled towers and steps: few graphs for any length of text, and the numbers of eager mode."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from configs.schema import load_config
from model.build import build_task
from model.task import RetrievalTask
from processor import training
from processor.resolve import resolve
from tests.helpers.configs import CONFIGS, TINY, TINY_IVT
from tests.helpers.graphs import counted_graphs
from tests.helpers.processes import together
from tests.helpers.runs import lines_of
from tests.helpers.tasks import tiny_batch
from utils.batch import Batch
from utils.checkpoint import load_checkpoint
from utils.errors import ConfigError
from utils.sharding import Shard

DEEP = "model.image.options={embed_dim: 64, depth: 3, num_heads: 1, patch_size: 16}"  # drop_path differs by block
LENGTHS = [10, 17, 12, 33, 20, 41, 9, 28, 37, 15, 22, 50, 11, 60, 8, 19, 25, 44, 31, 52]
GRAPHS = {
    ("towers", "irra"): {"ImageTower": 1, "TextTower": 1},
    ("towers", "rde"): {"ImageTower": 1, "TextTower": 1},
    ("towers", "lcr2s_teacher"): {"ImageTower": 2, "TextTower": 1},  # images of the batch, and of the support sets
    ("towers", "ivt"): {"IVTEncoder": 2},  # images and captions
    ("step", "fmfa"): {"RetrievalTask": 2},
    ("step", "rde"): {"RetrievalTask": 2},
}


def task_of(name: str, *overrides: str) -> RetrievalTask:
    tiny = [*TINY_IVT, DEEP] if name == "ivt" else TINY
    torch.manual_seed(0)
    return build_task(load_config(CONFIGS / f"{name}.yaml", [*tiny, *overrides]), num_pids=5, teacher=False)


def batch_of(task: RetrievalTask, length: int) -> Batch:
    """A batch of this text length; the numbers of supports and of masked tokens vary with it."""
    batch, supports = tiny_batch(task, length=64 if task.full_text else length), 2 + length % 5
    if "mlm_positions" in batch:
        batch["mlm_positions"] = torch.arange(3 + length % 7)
    mask = torch.arange(8).view(4, 2) < supports
    return batch | {
        "support_images": torch.randn(supports, 3, 64, 32),
        "support_image_mask": mask,
        "support_caption_ids": batch["caption_ids" if "caption_ids" in batch else "mlm_ids"][:1].repeat(supports, 1),
        "support_caption_mask": mask,
    }


def losses_of(task: RetrievalTask, lengths: list[int]) -> list[Tensor]:
    """The losses of training steps."""
    losses = []
    for number, length in enumerate(lengths):
        torch.manual_seed(number)  # of drop_path and masks
        loss, _ = task(batch_of(task, length))
        loss.backward()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("parts, name", GRAPHS)
def test_any_text_length_has_few_graphs(parts: Literal["towers", "step"], name: str) -> None:
    task = task_of(name).train()
    expected = losses_of(task, LENGTHS[:3])
    with counted_graphs() as graphs:
        task.compile_parts(parts)
        losses = losses_of(task, LENGTHS)
    assert graphs == GRAPHS[parts, name] | {"breaks": 0}
    torch.testing.assert_close(losses[:3], expected, rtol=1e-4, atol=1e-5)


def shared_loss(parts: str) -> tuple[float, dict[str, int]]:
    """In two processes: the loss of a batch after gathering, and the graphs."""
    task = task_of("rde").train()
    with counted_graphs() as graphs:
        task.compile_parts(parts)  # type: ignore[arg-type]
        loss, _ = task(batch_of(task, 12), Shard((4, 4)))
        loss.backward()
    return float(loss.detach()), dict(graphs)


def test_a_step_of_two_processes_is_one_graph_with_its_gather() -> None:
    (eager, _), _ = together(2, shared_loss, "none")
    for loss, graphs in together(2, shared_loss, "step"):
        assert loss == pytest.approx(eager, rel=1e-4) and graphs == {"RetrievalTask": 1, "breaks": 0}


@pytest.mark.parametrize("parts", ["true", "step"])  # true: as in version 0.1
def test_compiled_training_is_training(parts: str, tiny: list[str], tmp_path: Path) -> None:
    config = resolve(load_config(CONFIGS / "irra.yaml", [*tiny, f"train.compile={parts}", "train.ema=0.5"]))
    assert config.train.compile == parts.replace("true", "towers")
    with counted_graphs() as graphs:
        run = training.train(config, tmp_path / "run")
    assert bool(graphs["RetrievalTask"]) == (parts == "step") and graphs["TextTower"] >= 1
    plain = training.train(resolve(load_config(CONFIGS / "irra.yaml", tiny)), tmp_path / "plain")
    assert load_checkpoint(run / "last.pt")["model"].keys() == load_checkpoint(plain / "last.pt")["model"].keys()
    assert lines_of(run)[0]["loss"] == pytest.approx(lines_of(plain)[0]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "option, message",
    [
        ("train.accumulate=2", "train.accumulate: must be 1 with train.compile=step, got 2"),
        ("train.matmul=high", "train.matmul: must be highest with train.compile=step, got high"),
    ],
)
def test_a_compiled_step_is_whole_and_precise(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS / "irra.yaml", ["train.compile=step", option])


def test_ivts_masks_are_not_part_of_a_graph() -> None:
    with pytest.raises(ConfigError, match=r"train.compile: cannot be step, because model.mask_ratio .*=towers"):
        task_of("ivt", "train.compile=step")
