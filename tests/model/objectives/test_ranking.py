"""Ranking losses: the authors' values, explicit loops, limits, gradients, options."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.objectives import OBJECTIVES
from model.objectives.ranking import tal_loss, triplet_alignment, triplet_ranking, trl_loss
from tests.helpers.golden import golden_case, leaf
from tests.helpers.objectives import METADATA, objective_step
from utils.config import constructor_options
from utils.errors import ConfigError


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_case("rde_public.npz")


@pytest.mark.parametrize("theirs, loss", [("TAL", triplet_alignment), ("TRL", triplet_ranking)])
def test_losses_of_scores_are_the_authors(theirs: str, loss, golden: dict[str, np.ndarray]) -> None:
    pids = torch.from_numpy(golden["loss/pid"])
    options = {"tau": float(golden["loss/tau"]), "margin": float(golden["loss/margin"])}
    for scores, values, gradient in (
        ("scores", "per_sample", "grad_scores_of_sum"),
        ("raw_scores", "raw_per_sample", "raw_grad"),
    ):
        given = leaf(golden[f"loss/{scores}"])
        losses = loss(given, pids, **options)
        losses.sum().backward()
        np.testing.assert_allclose(losses.detach(), golden[f"loss/{theirs}/{values}"], rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(given.grad, golden[f"loss/{theirs}/{gradient}"], rtol=1e-9, atol=1e-12)


# --- explicit loops and properties ------------------------------------------------------------------------------------


def random_scores(seed: int, size: int = 7, people: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(size, 6, generator=generator, dtype=torch.float64)) for _ in range(2))
    return text @ image.T, torch.randint(people, (size,), generator=generator)


def loop(scores: Tensor, pids: Tensor, tau: float, margin: float, kind: str) -> list[float]:
    """TAL and the variants of TRL, pair by pair."""
    total = [0.0] * len(pids)
    for rows in (scores.tolist(), scores.T.tolist()):
        for i, row in enumerate(rows):
            positives = [x for x, pid in zip(row, pids, strict=True) if pid == pids[i]]
            negatives = [x for x, pid in zip(row, pids, strict=True) if pid != pids[i]]
            weights = [math.exp(x / tau) for x in positives]
            positive = sum(w * x for w, x in zip(weights, positives, strict=True)) / sum(weights)
            if kind == "tal" and negatives:
                total[i] += max(0.0, margin - positive + tau * math.log(sum(math.exp(x / tau) for x in negatives)))
            elif kind == "trl":
                total[i] += max(0.0, margin - positive + max([0.0, *negatives]))
            elif kind == "trl without floor" and negatives:
                total[i] += max(0.0, margin - positive + max(negatives))
            elif kind == "trl-s":
                total[i] += sum(max(0.0, margin - positive + x) for x in negatives)
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau, margin", [(0.1, 0.2), (0.015, 0.1), (0.5, 1.0)])
def test_ranking_losses_equal_explicit_loops(seed: int, tau: float, margin: float) -> None:
    scores, pids = random_scores(seed)
    options = {"tau": tau, "margin": margin}
    for losses, kind in (
        (triplet_alignment(scores, pids, **options), "tal"),
        (triplet_ranking(scores, pids, **options), "trl"),
        (triplet_ranking(scores, pids, zero_floor=False, **options), "trl without floor"),
        (triplet_ranking(scores, pids, negatives="all", **options), "trl-s"),
    ):
        np.testing.assert_allclose(losses, loop(scores, pids, tau, margin, kind), rtol=1e-10, atol=1e-12, err_msg=kind)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 9), shift=st.floats(-1, 1))
def test_symmetries_of_tal(seed: int, size: int, shift: float) -> None:
    scores, pids = random_scores(seed, size)
    losses = triplet_alignment(scores, pids)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(triplet_alignment(scores[order][:, order], pids[order]), losses[order])
    torch.testing.assert_close(triplet_alignment(scores.T, pids), losses)
    torch.testing.assert_close(
        triplet_alignment(scores + shift, pids), losses
    )  # positives and negatives shift together
    assert (losses >= triplet_ranking(scores, pids, zero_floor=False) - 1e-9).all()


def test_tal_tends_to_the_hardest_negative() -> None:
    scores, pids = random_scores(3)
    for tau in (1e-2, 1e-3, 1e-4):
        bound = 2 * tau * math.log(len(pids)) + 1e-9
        gap = triplet_alignment(scores, pids, tau=tau) - triplet_ranking(scores, pids, tau=tau, zero_floor=False)
        assert (gap >= -1e-9).all() and (gap <= bound).all()


@pytest.mark.parametrize("tau", [0.005, 0.0005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_temperatures_are_finite(tau: float, dtype: torch.dtype) -> None:
    """The authors' code overflows here: exp(1 / 0.01) exceeds fp32."""
    for scores in (torch.ones(6, 6, dtype=dtype), -torch.ones(6, 6, dtype=dtype), random_scores(0, 6)[0].to(dtype)):
        scores.requires_grad_()
        for loss in (triplet_alignment, triplet_ranking):
            total = loss(scores, torch.arange(6), tau=tau).sum()
            (gradient,) = torch.autograd.grad(total, scores)
            assert total.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"zero_floor": False}, {"negatives": "all"}])
def test_a_batch_of_one_identity_has_no_loss_and_no_gradient(options: dict) -> None:
    scores = (0.01 * random_scores(1, 5)[0]).requires_grad_()  # positives below the margin
    pids = torch.zeros(5)
    losses = (
        [triplet_ranking(scores, pids, **options)]
        if options
        else [triplet_alignment(scores, pids), triplet_ranking(scores, pids)]
    )
    for values in losses:
        (gradient,) = torch.autograd.grad(values.sum(), scores)
        assert not values.any() and not gradient.any()


def test_one_identity_more_than_the_others_is_left_out_alone() -> None:
    """A batch of one pair has no negatives; in any other batch, all pairs have negatives or none has."""
    scores = torch.tensor([[0.3]], requires_grad=True)
    triplet_alignment(scores, torch.tensor([4])).sum().backward()
    assert scores.grad is not None and not scores.grad.any()


def test_the_gradient_of_an_active_anchor_is_the_analytic_one() -> None:
    scores, pids = random_scores(2)
    scores.requires_grad_()
    tau, margin = 0.1, 5.0  # every hinge is active
    triplet_alignment(scores, pids, tau=tau, margin=margin).sum().backward()
    same = pids[:, None] == pids[None, :]

    def expected(rows: Tensor) -> Tensor:
        alpha = (rows / tau).masked_fill(~same, -math.inf).softmax(1)
        return (rows / tau).masked_fill(same, -math.inf).softmax(1) - alpha

    values = scores.detach()
    torch.testing.assert_close(scores.grad, expected(values) + expected(values.T).T)
    torch.testing.assert_close(expected(values).sum(1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    """One positive per pair makes alpha 1; otherwise alpha is detached, which finite differences ignore."""
    weights = torch.rand(4, dtype=torch.float64)
    scores = torch.eye(4, dtype=torch.float64) * 0.3 + 0.01 * torch.rand(4, 4, dtype=torch.float64)
    scores.requires_grad_()
    for loss in (triplet_alignment, triplet_ranking):
        assert torch.autograd.gradcheck(
            lambda x, f=loss: (f(x, torch.arange(4), tau=0.1, margin=0.5) * weights).sum(), scores
        )


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tal", "trl"])
@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_must_be_positive(name: str, tau: float) -> None:
    with pytest.raises(ConfigError, match=rf"losses\.{name}\.tau: must be (above 0|a finite number), got"):
        constructor_options(OBJECTIVES.get(name, ""), {"tau": tau}, f"losses.{name}")


@pytest.mark.parametrize(
    "name, option, value",
    [("trl", "negatives", "all"), ("trl", "zero_floor", False), ("tal", "margin", 0.7), ("trl", "margin", 0.7)],
)
def test_options_reach_the_loss(name: str, option: str, value) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 4, generator=generator) for _ in range(2))
    step = objective_step((image, text), pids=torch.arange(6))
    scores = F.normalize(text) @ F.normalize(image).T
    loss, _ = OBJECTIVES.get(name, "")(METADATA, **{option: value})(step)
    function = {"tal": triplet_alignment, "trl": triplet_ranking}[name]
    torch.testing.assert_close(loss, function(scores, step.pids, **{option: value}).sum())
    assert not torch.isclose(loss, function(scores, step.pids).sum())


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, of_scores", [(tal_loss, triplet_alignment), (trl_loss, triplet_ranking)])
def test_losses_of_embeddings_are_those_of_their_cosines(loss: Callable, of_scores: Callable) -> None:
    generator = torch.Generator().manual_seed(2)
    image, text = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    pids = torch.tensor([0, 1, 1, 2, 3, 3])
    expected = of_scores(F.normalize(text) @ F.normalize(image).T, pids, tau=0.1, margin=0.3)
    torch.testing.assert_close(loss(3 * image, text, pids, tau=0.1, margin=0.3, reduction="none"), expected)
    torch.testing.assert_close(loss(image, text, pids, tau=0.1, margin=0.3), expected.mean())
