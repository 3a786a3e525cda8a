"""Per-pair losses: pairs outside the clean mask lose their own terms only, and the log separates clean from noisy."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from model.objectives import OBJECTIVES, Objective, PairObjective, Step
from tests.helpers.objectives import METADATA, objective_step


class Context(NamedTuple):
    """Training pairs with given losses, before an epoch."""

    losses: Tensor
    seen: Tensor
    clean: np.ndarray
    epoch: int = 1

    def pair_losses(self, objective: Objective) -> tuple[Tensor, Tensor]:
        return self.losses, self.seen

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(0)


def pair_objectives() -> list[str]:
    return [name for name in OBJECTIVES if issubclass(OBJECTIVES.get(name, ""), PairObjective)]  # type: ignore[arg-type]


def random_step(size: int = 6, index: Tensor | None = None, **batch: Tensor) -> tuple[Step, list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    leaves = [torch.randn(size, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    index = torch.arange(size) if index is None else index
    return objective_step((leaves[0], leaves[1]), pids=torch.tensor([0, 1, 2, 0, 3, 4]), index=index, **batch), leaves


@pytest.mark.parametrize("name", pair_objectives())
def test_pairs_that_do_not_count_lose_their_own_terms_only(name: str) -> None:
    objective = OBJECTIVES.get(name, "")(METADATA, consensus="auto")
    step, leaves = random_step()
    losses = objective.pair_losses(step)[0].detach()  # type: ignore[operator]
    whole, _ = objective(step)
    torch.testing.assert_close(whole.detach(), losses.sum() if objective.summed else losses.mean())
    objective.clean_mask = torch.tensor([True, False, True, True, False, True])
    loss, _ = objective(step)
    kept = losses[objective.clean_mask]
    torch.testing.assert_close(loss.detach(), kept.sum() if objective.summed else kept.mean())
    objective.clean_mask[:] = False
    loss, _ = objective(step)
    loss.backward()
    assert float(loss.detach()) == 0 and all(tensor.grad is not None and not tensor.grad.any() for tensor in leaves)


def test_losses_on_embeddings_have_a_value_for_each_pair() -> None:
    assert {"asdm", "cmpm", "itc", "sdm", "tal", "trl"} <= set(pair_objectives())


def test_a_pair_with_several_rows_counts_by_its_index() -> None:
    objective = OBJECTIVES.get("itc", "")(METADATA, consensus="auto")
    objective.clean_mask = torch.tensor([False, True, False, False, False, False, False, True])
    step, _ = random_step(index=torch.tensor([7, 7, 2, 2, 1, 1]))  # three pairs, two rows each
    losses = objective.pair_losses(step)[0]  # type: ignore[operator]
    torch.testing.assert_close(objective(step)[0], losses[[0, 1, 4, 5]].mean())


def test_the_log_tells_clean_pairs_from_noisy_ones() -> None:
    step, _ = random_step(clean=torch.tensor([True, True, False, True, False, True]))
    objective = OBJECTIVES.get("sdm", "")(METADATA)
    losses = objective.pair_losses(step)[0]  # type: ignore[operator]
    _, values = objective(step)
    clean, noisy = values["loss_clean"], values["loss_noisy"]
    assert (int(clean.number), int(noisy.number)) == (4, 2) and not clean.total.requires_grad
    torch.testing.assert_close(clean.total / 4, losses[[0, 1, 3, 5]].mean().detach())
    torch.testing.assert_close(noisy.total / 2, losses[[2, 4]].mean().detach())
    assert objective(random_step()[0])[1] == {}


def test_an_objective_keeps_what_was_decided_of_each_pair() -> None:
    objective = OBJECTIVES.get("tal", "")(METADATA, consensus="short")
    rng = np.random.default_rng(0)
    clean = rng.random(80) < 0.5
    losses = torch.from_numpy(np.where(clean, 0.1, 1.0) + rng.normal(0, 0.01, (2, 80))).float()
    seen = torch.ones(80, dtype=torch.bool)
    seen[:5] = False
    losses[:, :5] = math.nan  # unreadable images
    context = Context(losses, seen, clean)
    metrics = objective.before_epoch(context)
    assert objective.clean_mask[:5].all()
    assert np.array_equal(objective.clean_mask[5:].numpy(), clean[5:])
    mask = objective.clean_mask.double().numpy()
    assert metrics == {
        "counted": pytest.approx(mask.mean()),
        "counted_clean": pytest.approx(mask[clean].mean()),
        "counted_noisy": pytest.approx(mask[~clean].mean()),
    }
    again = OBJECTIVES.get("tal", "")(METADATA, consensus="short")
    again.load_training_state(objective.training_state())
    assert torch.equal(again.clean_mask, objective.clean_mask)


def test_without_consensus_nothing_is_divided() -> None:
    objective = OBJECTIVES.get("tal", "")(METADATA)
    assert objective.before_epoch(None) == {} and objective.training_state() == {}  # type: ignore[arg-type]
