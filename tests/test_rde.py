"""RDE: ranking losses, token selection and consensus division against the authors' values, loops and their limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.objectives import OBJECTIVES, Facts, PairObjective, Step
from model.objectives.consensus import FITS, choose_fit, confident, divide, looks_clean, low_posterior
from model.objectives.ranking import tal_loss, trl_loss
from tests.conftest import GOLDEN
from utils.errors import ConfigError, TrainingError

FACTS = Facts(num_pids=5, embed_dim=16, vocab_size=100)
NAMES = {"TAL": "tal", "TRL": "trl", "InfoNCE": "itc", "SDM": "sdm"}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    stored = np.load(GOLDEN / "rde_public.npz")
    return {name.removeprefix("case0/"): stored[name] for name in stored.files}


def leaf(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).clone().requires_grad_()


def step_of(*embeddings: tuple[Tensor, Tensor], pids: Tensor, **batch: Tensor) -> Step:
    empty = torch.empty(0)
    return Step(
        embeddings=embeddings,
        pids=pids,
        logit_scale=50.0,
        image_tokens=empty,
        caption_ids=empty,
        text_tokens=empty,
        teacher=None,
        texts={},
        batch=batch,
    )


def objective_of(name: str, golden: dict[str, np.ndarray], **options) -> PairObjective:
    if name in ("tal", "trl"):
        options |= {"tau": float(golden["loss/tau"]), "margin": float(golden["loss/margin"])}
    built = OBJECTIVES.get(name, "")(FACTS, **options)
    assert isinstance(built, PairObjective)
    return built


# --- losses: the authors' -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", NAMES)
def test_losses_of_each_pair_are_the_authors(theirs: str, golden: dict[str, np.ndarray]) -> None:
    objective = objective_of(NAMES[theirs], golden)
    image, text = leaf(golden["loss/image_feats"]), leaf(golden["loss/text_feats"])
    step = step_of((image, text), pids=torch.from_numpy(golden["loss/pid"]))
    assert float(golden["loss/logit_scale"]) == step.logit_scale
    losses = objective.pair_losses(step)[0]
    losses.sum().backward()
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if theirs == "SDM" else {"rtol": 1e-9, "atol": 1e-12}  # fp32 inside theirs
    for actual, name in ((losses.detach(), "per_sample"), (image.grad, "grad_image_of_sum")):
        np.testing.assert_allclose(actual.numpy(), golden[f"loss/{theirs}/{name}"], **tolerance)  # type: ignore[union-attr]
    np.testing.assert_allclose(text.grad.numpy(), golden[f"loss/{theirs}/grad_text_of_sum"], **tolerance)  # type: ignore[union-attr]


@pytest.mark.parametrize("theirs", NAMES)
def test_recalibrated_losses_of_two_embeddings_are_the_authors(theirs: str, golden: dict[str, np.ndarray]) -> None:
    objective = objective_of(NAMES[theirs], golden)
    names = ("image", "text", "image_tse", "text_tse")
    leaves = [
        leaf(golden[f"loss/{name.replace('image', 'image_feats').replace('text', 'text_feats')}"]) for name in names
    ]
    pids, labels = torch.from_numpy(golden["loss/pid"]), torch.from_numpy(golden["loss/label_hat"])
    objective.counted = torch.zeros(20, dtype=torch.bool)
    places = torch.tensor([3, 17, 0, 8, 5, 11, 19, 2])
    objective.counted[places] = labels.bool()
    step = step_of((leaves[0], leaves[1]), (leaves[2], leaves[3]), pids=pids, index=places)
    loss, _ = objective(step)
    loss.backward()
    expected = golden[f"loss/{theirs}/rbs_bge"] + golden[f"loss/{theirs}/rbs_tse"]
    np.testing.assert_allclose(float(loss.detach()), expected, rtol=1e-7)
    for name, tensor in zip(names, leaves, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad, golden[f"loss/{theirs}/rbs_grad_{name}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("theirs, loss", [("TAL", tal_loss), ("TRL", trl_loss)])
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


# --- losses: explicit loops and properties --------------------------------------------------------------------------


def random_scores(seed: int, size: int = 7, people: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(size, 6, generator=generator, dtype=torch.float64)) for _ in range(2))
    return text @ image.T, torch.randint(people, (size,), generator=generator)


def loop(scores: Tensor, pids: Tensor, tau: float, margin: float, kind: str) -> list[float]:
    """RDE spec 4.1 and 4.2, pair by pair."""
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
        (tal_loss(scores, pids, **options), "tal"),
        (trl_loss(scores, pids, **options), "trl"),
        (trl_loss(scores, pids, zero_floor=False, **options), "trl without floor"),
        (trl_loss(scores, pids, negatives="all", **options), "trl-s"),
    ):
        np.testing.assert_allclose(losses, loop(scores, pids, tau, margin, kind), rtol=1e-10, atol=1e-12, err_msg=kind)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 9), shift=st.floats(-1, 1))
def test_symmetries_of_tal(seed: int, size: int, shift: float) -> None:
    scores, pids = random_scores(seed, size)
    losses = tal_loss(scores, pids)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(tal_loss(scores[order][:, order], pids[order]), losses[order])
    torch.testing.assert_close(tal_loss(scores.T, pids), losses)
    torch.testing.assert_close(tal_loss(scores + shift, pids), losses)  # positives and negatives move alike
    assert (losses >= trl_loss(scores, pids, zero_floor=False) - 1e-9).all()


def test_tal_tends_to_the_hardest_negative() -> None:
    scores, pids = random_scores(3)
    for tau in (1e-2, 1e-3, 1e-4):
        bound = 2 * tau * math.log(len(pids)) + 1e-9
        gap = tal_loss(scores, pids, tau=tau) - trl_loss(scores, pids, tau=tau, zero_floor=False)
        assert (gap >= -1e-9).all() and (gap <= bound).all()


@pytest.mark.parametrize("tau", [0.005, 0.0005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_temperatures_are_finite(tau: float, dtype: torch.dtype) -> None:
    """The reference overflows: exp(1 / 0.01) is more than fp32 holds."""
    for scores in (torch.ones(6, 6, dtype=dtype), -torch.ones(6, 6, dtype=dtype), random_scores(0, 6)[0].to(dtype)):
        scores.requires_grad_()
        for loss in (tal_loss, trl_loss):
            total = loss(scores, torch.arange(6), tau=tau).sum()
            (gradient,) = torch.autograd.grad(total, scores)
            assert total.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"zero_floor": False}, {"negatives": "all"}])
def test_a_batch_of_one_identity_has_no_loss_and_no_gradient(options: dict) -> None:
    scores = (0.01 * random_scores(1, 5)[0]).requires_grad_()  # positives below the margin
    pids = torch.zeros(5)
    losses = [trl_loss(scores, pids, **options)] if options else [tal_loss(scores, pids), trl_loss(scores, pids)]
    for values in losses:
        (gradient,) = torch.autograd.grad(values.sum(), scores)
        assert not values.any() and not gradient.any()


def test_one_identity_more_than_the_others_is_left_out_alone() -> None:
    """A pair without negatives in one batch with pairs that have some cannot be; a batch of one pair can."""
    scores = torch.tensor([[0.3]], requires_grad=True)
    tal_loss(scores, torch.tensor([4])).sum().backward()
    assert scores.grad is not None and not scores.grad.any()


def test_the_gradient_of_an_active_anchor_is_the_analytic_one() -> None:
    scores, pids = random_scores(2)
    scores.requires_grad_()
    tau, margin = 0.1, 5.0  # every hinge is active
    tal_loss(scores, pids, tau=tau, margin=margin).sum().backward()
    same = pids[:, None] == pids[None, :]

    def expected(rows: Tensor) -> Tensor:
        alpha = (rows / tau).masked_fill(~same, -math.inf).softmax(1)
        return (rows / tau).masked_fill(same, -math.inf).softmax(1) - alpha

    values = scores.detach()
    torch.testing.assert_close(scores.grad, expected(values) + expected(values.T).T)
    torch.testing.assert_close(expected(values).sum(1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    """With one positive each, alpha is 1: elsewhere it is a constant that finite differences do not know."""
    weights = torch.rand(4, dtype=torch.float64)
    scores = torch.eye(4, dtype=torch.float64) * 0.3 + 0.01 * torch.rand(4, 4, dtype=torch.float64)
    scores.requires_grad_()
    for loss in (tal_loss, trl_loss):
        assert torch.autograd.gradcheck(
            lambda x, f=loss: (f(x, torch.arange(4), tau=0.1, margin=0.5) * weights).sum(), scores
        )


@pytest.mark.parametrize("name", ["tal", "trl"])
@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_must_be_positive(name: str, tau: float) -> None:
    with pytest.raises(ConfigError, match=rf"losses\.{name}\.tau: must be above 0"):
        OBJECTIVES.get(name, "")(FACTS, tau=tau)


@pytest.mark.parametrize(
    "name, option, value",
    [("trl", "negatives", "all"), ("trl", "zero_floor", False), ("tal", "margin", 0.7), ("trl", "margin", 0.7)],
)
def test_options_reach_the_loss(name: str, option: str, value) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 4, generator=generator) for _ in range(2))
    step = step_of((image, text), pids=torch.arange(6))
    scores = F.normalize(text) @ F.normalize(image).T
    loss, _ = OBJECTIVES.get(name, "")(FACTS, **{option: value})(step)
    function = {"tal": tal_loss, "trl": trl_loss}[name]
    torch.testing.assert_close(loss, function(scores, step.pids, **{option: value}).sum())
    assert not torch.isclose(loss, function(scores, step.pids).sum())


# --- which pairs count ----------------------------------------------------------------------------------------------


def pair_objectives() -> list[str]:
    return [name for name in OBJECTIVES if issubclass(OBJECTIVES.get(name, ""), PairObjective)]  # type: ignore[arg-type]


def random_step(size: int = 6, index: Tensor | None = None, **batch: Tensor) -> tuple[Step, list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    leaves = [torch.randn(size, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    index = torch.arange(size) if index is None else index
    return step_of((leaves[0], leaves[1]), pids=torch.tensor([0, 1, 2, 0, 3, 4]), index=index, **batch), leaves


@pytest.mark.parametrize("name", ["sdm", "asdm", "itc", "cmpm", "tal", "trl"])
def test_pairs_that_do_not_count_lose_their_own_terms_only(name: str) -> None:
    assert name in pair_objectives()
    objective = OBJECTIVES.get(name, "")(FACTS, consensus="auto")
    step, leaves = random_step()
    losses = objective.pair_losses(step)[0].detach()  # type: ignore[operator]
    whole, _ = objective(step)
    torch.testing.assert_close(whole.detach(), losses.sum() if objective.summed else losses.mean())
    objective.counted = torch.tensor([True, False, True, True, False, True])
    loss, _ = objective(step)
    kept = losses[objective.counted]
    torch.testing.assert_close(loss.detach(), kept.sum() if objective.summed else kept.mean())
    objective.counted[:] = False
    loss, _ = objective(step)
    loss.backward()
    assert float(loss.detach()) == 0 and all(tensor.grad is not None and not tensor.grad.any() for tensor in leaves)


def test_every_loss_with_a_value_for_each_pair_is_tested_above() -> None:
    assert sorted(pair_objectives()) == ["asdm", "cmpm", "itc", "sdm", "tal", "trl"]


def test_a_pair_with_several_rows_counts_by_its_index() -> None:
    objective = OBJECTIVES.get("itc", "")(FACTS, consensus="auto")
    objective.counted = torch.tensor([False, True, False, False, False, False, False, True])
    step, _ = random_step(index=torch.tensor([7, 2, 1]))  # three pairs, two rows each
    losses = objective.pair_losses(step)[0]  # type: ignore[operator]
    torch.testing.assert_close(objective(step)[0], losses[[0, 1, 4, 5]].mean())


def test_the_log_tells_clean_pairs_from_noisy_ones() -> None:
    step, _ = random_step(clean=torch.tensor([True, True, False, True, False, True]))
    objective = OBJECTIVES.get("sdm", "")(FACTS)
    losses = objective.pair_losses(step)[0]  # type: ignore[operator]
    _, values = objective(step)
    clean, noisy = values["loss_clean"], values["loss_noisy"]
    assert (int(clean.number), int(noisy.number)) == (4, 2) and not clean.total.requires_grad
    torch.testing.assert_close(clean.total / 4, losses[[0, 1, 3, 5]].mean().detach())
    torch.testing.assert_close(noisy.total / 2, losses[[2, 4]].mean().detach())
    assert objective(random_step()[0])[1] == {}


# --- consensus division ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
def test_the_mixture_is_the_authors(fit: str, golden: dict[str, np.ndarray]) -> None:
    votes = np.zeros(400, dtype=int)
    for branch in "AB":
        losses = golden[f"ccd/loss{branch}"]
        assert losses.dtype == np.float32
        posterior = low_posterior(losses, FITS[fit])
        np.testing.assert_allclose(posterior, golden[f"ccd/{fit}/prob{branch}"], rtol=0, atol=1e-10)
        clean = looks_clean(losses, FITS[fit])
        assert np.array_equal(clean, golden[f"ccd/{fit}/pred{branch}"].astype(bool))
        votes += clean
    assert np.array_equal(votes, golden[f"ccd/{fit}/votes"])


def test_where_nothing_looks_noisy_a_hundredth_is_taken_out(golden: dict[str, np.ndarray]) -> None:
    posterior = golden["ccd/corner_prob"]
    assert posterior.min() > 0.5
    assert np.array_equal(confident(posterior), golden["ccd/corner_pred"].astype(bool))
    for n in (1, 99, 100, 350, 1000):
        posterior = np.random.default_rng(n).permutation(np.linspace(0.6, 0.9, n))
        assert (~confident(posterior)).sum() == n // 100 + 1
        assert posterior[~confident(posterior)].max() <= posterior.min() + 0.3 * (n // 100) / max(n - 1, 1) + 1e-12
    assert np.array_equal(confident(np.array([0.5, 0.4, 0.51])), [False, False, True])


def test_equal_losses_all_look_clean() -> None:
    for fit in FITS.values():
        assert looks_clean(np.full(50, 1.7, dtype=np.float32), fit).all()
        assert divide(np.zeros((2, 50), dtype=np.float32), fit, np.random.default_rng(0)).all()


@pytest.mark.parametrize("fit", FITS)
def test_two_clusters_are_told_apart(fit: str) -> None:
    rng = np.random.default_rng(0)
    clean = rng.random(600) < 0.6
    losses = np.where(clean, rng.normal(0.2, 0.05, (2, 600)), rng.normal(1.5, 0.1, (2, 600))).astype(np.float32)
    assert np.array_equal(divide(losses, FITS[fit], np.random.default_rng(1)), clean)


def test_votes() -> None:
    """Both embeddings clean, both noisy, split: the coin decides, the same for the same seed and epoch."""
    low, high = np.full(300, 0.1), np.full(300, 2.0)
    spread = np.linspace(0, 0.05, 300)
    losses = np.stack([np.concatenate([low, high, low]), np.concatenate([low, high, high])]) + np.tile(spread, 3)
    counted = divide(losses, FITS["long"], np.random.default_rng([1, 5]))
    assert counted[:300].all() and not counted[300:600].any()
    assert 110 < counted[600:].sum() < 190
    assert np.array_equal(counted, divide(losses, FITS["long"], np.random.default_rng([1, 5])))
    assert not np.array_equal(counted, divide(losses, FITS["long"], np.random.default_rng([1, 6])))
    one = divide(losses[:1], FITS["long"], np.random.default_rng(0))  # one embedding has nothing to agree with
    assert np.array_equal(one, np.concatenate([np.ones(300), np.zeros(300), np.ones(300)]).astype(bool))


def test_losses_that_are_not_finite_stop() -> None:
    losses = np.ones((2, 9), dtype=np.float32)
    losses[0, 3], losses[1, 3], losses[1, 5] = np.nan, np.inf, np.nan
    with pytest.raises(TrainingError, match="the losses of 2 of 9 training pairs are not finite"):
        divide(losses, FITS["short"], np.random.default_rng(0))


def test_the_authors_rule_for_the_fit() -> None:
    assert choose_fit("auto", 0.4, "cuhk_pedes") == FITS["short"] == (10, 1e-2, 5e-4)
    assert choose_fit("auto", 0.5, "cuhk_pedes") == FITS["long"] == (100, 1e-4, 1e-6)
    assert choose_fit("auto", 0.0, "rstpreid") == FITS["long"]
    assert choose_fit("short", 0.8, "rstpreid") == FITS["short"]
    assert choose_fit("long", 0.0, "icfg_pedes") == FITS["long"]


def test_an_objective_keeps_what_was_decided_of_each_pair() -> None:
    objective = OBJECTIVES.get("tal", "")(FACTS, consensus="short")
    rng = np.random.default_rng(0)
    clean = rng.random(80) < 0.5
    losses = torch.from_numpy(np.where(clean, 0.1, 1.0) + rng.normal(0, 0.01, (2, 80))).float()
    known = torch.ones(80, dtype=torch.bool)
    known[:5] = False
    losses[:, :5] = math.nan  # their images cannot be read
    objective.divide(losses, known, np.random.default_rng(0))  # type: ignore[operator]
    assert objective.counted[:5].all()
    assert np.array_equal(objective.counted[5:].numpy(), clean[5:])
