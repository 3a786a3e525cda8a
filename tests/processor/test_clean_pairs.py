"""Clean/noisy split before an epoch: per-pair losses over all training pairs, and the objectives that use them."""

from pathlib import Path

import pytest
import torch

from model.objectives import PairObjective
from processor.clean_pairs import PairLosses, before_epoch
from tests.helpers.configs import NOISE, ROOT, rde_config
from tests.helpers.loaders import fields_of
from tests.helpers.tasks import flagged_loader_of, task_of
from utils.errors import TrainingError

CPU = {"device": torch.device("cpu"), "precision": "fp32", "seed": 1}


def test_losses_are_those_of_each_pair_in_its_batch(root: Path) -> None:
    config = rde_config(root, NOISE)
    task = task_of(config)
    loader, objective = flagged_loader_of(config, task), task.objectives["tal"]
    assert isinstance(objective, PairObjective)
    task.train()
    losses, seen = PairLosses(task, loader, 3, **CPU).pair_losses(objective)  # type: ignore[arg-type]
    assert not task.training and seen.all() and losses.shape == (2, 32)
    assert not losses.requires_grad
    for batch in fields_of(loader.every_pair(3)):
        with torch.no_grad():
            expected = objective.pair_losses(task.gathered_step(batch))
        torch.testing.assert_close(losses[:, batch["index"]], expected)


def test_workers_do_not_matter(root: Path) -> None:
    decisions = []
    for workers in (0, 1):
        config = rde_config(root, NOISE, f"data.workers={workers}")
        task = task_of(config)
        loader = flagged_loader_of(config, task)
        for epoch in (1, 2):
            before_epoch(task, loader, epoch, **CPU)  # type: ignore[arg-type]
            decisions.append(task.objectives["tal"].clean_mask.clone())  # type: ignore[union-attr, operator]
            list(fields_of(loader.epoch(epoch)))
    assert torch.equal(decisions[0], decisions[2]) and torch.equal(decisions[1], decisions[3])


def test_a_pair_with_three_texts_has_the_mean_of_its_rows(root: Path) -> None:
    config = rde_config(root, "losses.cmpm.consensus=auto", "data.batch_size=4", config=ROOT / "configs/ivt.yaml")
    assert config.data.views == 3
    task = task_of(config)
    loader, objective = flagged_loader_of(config, task), task.objectives["cmpm"]
    losses, _ = PairLosses(task, loader, 1, **CPU).pair_losses(objective)  # type: ignore[arg-type]
    batch = next(iter(fields_of(loader.every_pair(1))))
    index = batch["index"][::3]
    assert len(batch["images"]) == 3 * len(index)
    with torch.no_grad():
        rows = objective.pair_losses(task.gathered_step(batch))[0]  # type: ignore[operator, union-attr]
    expected = [rows[3 * place : 3 * place + 3].mean() for place in range(len(index))]
    torch.testing.assert_close(losses[0, index], torch.stack(expected))


def test_a_pair_whose_image_is_skipped_is_not_asked_for(root: Path) -> None:
    config = rde_config(root, "data.on_bad_image=skip")
    task = task_of(config)
    loader = flagged_loader_of(config, task)
    loader.pairs.images.paths[5] = "/nowhere.jpg"
    values = before_epoch(task, loader, 1, **CPU)  # type: ignore[arg-type]
    _, seen = PairLosses(task, loader, 1, **CPU).pair_losses(task.objectives["tal"])  # type: ignore[arg-type]
    assert seen.tolist() == [place != 5 for place in range(32)]
    assert task.objectives["tal"].clean_mask[5] and 0 < values["tal_counted"] <= 1  # type: ignore[index, union-attr]


def test_without_consensus_there_is_no_pass(root: Path) -> None:
    config = rde_config(root, "losses.tal.consensus=null")
    task = task_of(config)
    loader = flagged_loader_of(config, task)
    loader.every_pair = None  # type: ignore[assignment, method-assign]
    assert before_epoch(task, loader, 1, **CPU) == {}  # type: ignore[arg-type]
    assert task.objectives["tal"].clean_mask is None


def test_coins_are_thrown_by_seed_and_epoch_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = rde_config(root)
    task = task_of(config)
    loader, thrown = flagged_loader_of(config, task), []

    def hook(self: PairObjective, context: PairLosses) -> dict[str, float]:
        thrown.append(float(context.rng().random()))
        return {}

    monkeypatch.setattr(PairObjective, "before_epoch", hook)
    for epoch, seed in ((1, 1), (2, 1), (1, 2), (1, 1)):
        before_epoch(task, loader, epoch, **CPU | {"seed": seed})  # type: ignore[arg-type]
    assert thrown[0] == thrown[3] and len(set(thrown)) == 3


def test_several_losses_share_one_pass(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = rde_config(root, "losses.sdm={consensus: auto}")
    task = task_of(config)
    loader, passes = flagged_loader_of(config, task), []
    every_pair = loader.every_pair
    monkeypatch.setattr(loader, "every_pair", lambda epoch: passes.append(epoch) or every_pair(epoch))
    metrics = before_epoch(task, loader, 4, **CPU)  # type: ignore[arg-type]
    assert passes == [4] and {"tal_counted", "sdm_counted"} <= set(metrics)


def test_a_model_that_has_diverged_stops_with_a_message(root: Path) -> None:
    config = rde_config(root)
    task = task_of(config)
    torch.nn.init.constant_(task.encoder.selection["text"].skip.bias, float("nan"))  # type: ignore[arg-type, index, union-attr]
    with pytest.raises(TrainingError, match="the losses of 32 of 32 training pairs are not finite"):
        before_epoch(task, flagged_loader_of(config, task), 1, **CPU)  # type: ignore[arg-type]
