"""Matching losses: the authors' values and gradients, explicit loops in float64, symmetries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.objectives.matching import asdm_loss, cmpm_loss, itc_loss, sdm_loss
from tests.helpers.configs import GOLDEN
from tests.helpers.golden import assert_gradient, close, fmfa_case, leaf
from tests.helpers.loops import cosine, divergence, dot, softmax

MATCHING = {
    "sdm": lambda image, text, pids, scale=50.0, **options: sdm_loss(image, text, pids, logit_scale=scale, **options),
    "itc": lambda image, text, pids, scale=50.0, **options: itc_loss(image, text, logit_scale=scale, **options),
    "cmpm": lambda image, text, pids, scale=50.0, **options: cmpm_loss(image, text, pids, **options),
}


def random_pairs(seed: int, size: int = 7, dim: int = 5, people: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return image, text, torch.randint(people, (size,), generator=generator)


seeds = st.integers(0, 10_000)
each_loss = pytest.mark.parametrize("name", MATCHING)


# --- the authors' values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATCHING)
def test_matching_losses_are_the_authors(name: str, irra_golden: dict[str, np.ndarray]) -> None:
    image, text = leaf(irra_golden["case0/img"]), leaf(irra_golden["case0/txt"])
    pids, scale = torch.from_numpy(irra_golden["case0/pids"]), float(irra_golden["case0/logit_scale"])
    loss = MATCHING[name](image, text, pids, scale)
    np.testing.assert_allclose(float(loss.detach()), irra_golden[f"case0/{name}"], rtol=2e-5)
    loss.backward()
    assert_gradient(image.grad, irra_golden[f"case0/{name}__grad_img"])
    assert_gradient(text.grad, irra_golden[f"case0/{name}__grad_txt"])


@pytest.mark.parametrize("suffix", ["", "_unique"])
@pytest.mark.parametrize("precision, tolerance", [("f32", 1e-6), ("f64", 1e-7)])
def test_cmpm_is_the_authors(suffix: str, precision: str, tolerance: float) -> None:
    golden = np.load(GOLDEN / "ivt_cmpm.npz")
    image, text = (torch.from_numpy(golden[f"{name}_{precision}"]).requires_grad_() for name in ("img", "txt"))
    loss = cmpm_loss(image, text, torch.from_numpy(golden[f"labels{suffix}"]))
    np.testing.assert_allclose(float(loss.detach()), golden[f"loss{suffix}_{precision}"], rtol=tolerance)
    loss.backward()
    for name, tensor in (("img", image), ("txt", text)):
        close(tensor.grad, golden[f"grad_{name}{suffix}_{precision}"], 1e-6 if precision == "f32" else 1e-7)  # type: ignore[arg-type]


def test_three_levels_are_one_matrix() -> None:
    golden = np.load(GOLDEN / "ivt_cmpm.npz")
    image, text, pids = (torch.from_numpy(golden[f"mla_{name}"]) for name in ("img_f64", "txt_f64", "labels"))
    assert float(cmpm_loss(image, text, pids)) == pytest.approx(float(golden["mla_loss_f64"]), rel=1e-7)
    order = torch.tensor([0, 2, 4, 1, 3, 5])  # ordered by pair, as in our batches, not by level
    torch.testing.assert_close(cmpm_loss(image[order], text[order], pids[order]), cmpm_loss(image, text, pids))


def test_a_target_that_sums_to_one_has_no_negative_loss() -> None:
    image, pids = torch.eye(4, dtype=torch.float64) * 60, torch.tensor([0, 0, 1, 1])
    image[1], image[3] = image[0], image[2]
    assert float(cmpm_loss(image, image, pids)) == pytest.approx(-np.log(2), abs=1e-6)  # twice -ln(2) / 2
    assert float(cmpm_loss(image, image, pids, target_norm="sum")) == pytest.approx(0, abs=1e-6)


# --- explicit loops ---------------------------------------------------------------------------------------------------


def loop_sdm(image, text, pids, scale):
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(len(pids)):
            logits = [scale * cosine(a[i], b[j]) for j in range(len(pids))]
            same = [float(pid == pids[i]) for pid in pids]
            total += divergence(logits, [value / sum(same) for value in same], 1e-8) / len(pids)
    return total


def loop_itc(image, text, pids, scale):
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(len(pids)):
            total -= math.log(softmax([scale * cosine(a[i], b[j]) for j in range(len(pids))])[i]) / len(pids) / 2
    return total


def loop_cmpm(image, text, pids, scale):
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(len(pids)):
            logits = [dot(a[i], b[j]) / math.sqrt(dot(b[j], b[j])) for j in range(len(pids))]
            same = [float(pid == pids[i]) for pid in pids]
            total += divergence(logits, [value / math.sqrt(sum(same)) for value in same], 1e-8) / len(pids)
    return total


@pytest.mark.parametrize("name, loop", [("sdm", loop_sdm), ("itc", loop_itc), ("cmpm", loop_cmpm)])
@pytest.mark.parametrize("seed", range(3))
def test_matching_losses_equal_explicit_loops(name: str, loop, seed: int) -> None:
    image, text, pids = random_pairs(seed)
    expected = loop(image.tolist(), text.tolist(), pids.tolist(), 20.0)
    assert float(MATCHING[name](image, text, pids, 20.0)) == pytest.approx(expected, rel=1e-10)


# --- properties -------------------------------------------------------------------------------------------------------


@each_loss
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_order_of_the_pairs_does_not_matter(name: str, seed: int) -> None:
    image, text, pids = random_pairs(seed)
    order = torch.randperm(len(pids), generator=torch.Generator().manual_seed(seed))
    per_pair = MATCHING[name](image, text, pids, reduction="none")
    torch.testing.assert_close(
        MATCHING[name](image[order], text[order], pids[order], reduction="none"), per_pair[order]
    )


@each_loss
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_modalities_may_be_swapped(name: str, seed: int) -> None:
    image, text, pids = random_pairs(seed)
    torch.testing.assert_close(MATCHING[name](text, image, pids), MATCHING[name](image, text, pids))


@pytest.mark.parametrize("name", ["sdm", "itc"])
@settings(max_examples=20, deadline=None)
@given(seed=seeds, factor=st.floats(0.01, 100))
def test_norms_of_the_embeddings_do_not_matter(name: str, seed: int, factor: float) -> None:
    image, text, pids = random_pairs(seed)
    torch.testing.assert_close(MATCHING[name](factor * image, text, pids), MATCHING[name](image, text, pids))


@each_loss
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_only_equality_of_pids_matters(name: str, seed: int) -> None:
    image, text, pids = random_pairs(seed)
    torch.testing.assert_close(MATCHING[name](image, text, 1000 - 7 * pids), MATCHING[name](image, text, pids))


@each_loss
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_reduction_none_averages_to_the_loss(name: str, seed: int) -> None:
    image, text, pids = random_pairs(seed)
    per_pair = MATCHING[name](image, text, pids, reduction="none")
    assert per_pair.shape == pids.shape
    torch.testing.assert_close(per_pair.mean(), MATCHING[name](image, text, pids))


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_a_batch_given_twice_changes_each_loss_by_what_the_equation_says(seed: int) -> None:
    once = random_pairs(seed)
    twice = [torch.cat([part, part]) for part in once]
    # All probabilities halve. SDM's target halves as well, so only eps counts twice. CMPM's target falls by sqrt(2) in
    # each direction. ITC has two equal candidates instead of one.
    torch.testing.assert_close(MATCHING["sdm"](*twice), MATCHING["sdm"](*once, eps=2e-8))
    torch.testing.assert_close(MATCHING["cmpm"](*twice), MATCHING["cmpm"](*once, eps=2**0.5 * 1e-8) - math.log(2))
    torch.testing.assert_close(MATCHING["itc"](*twice), MATCHING["itc"](*once) + math.log(2))


@each_loss
@pytest.mark.parametrize("scale", [1.0, 50.0, 100.0])
def test_extreme_inputs_give_finite_losses_and_gradients(name: str, scale: float) -> None:
    image, text, pids = (part.float() if part.is_floating_point() else part for part in random_pairs(0))
    text = -image  # all pairs at maximal distance
    image[0] = 0  # an embedding of zeros
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    loss = MATCHING[name](image, text, pids, scale)
    loss.backward()
    assert loss.isfinite()
    assert image.grad is not None and image.grad.isfinite().all()
    assert text.grad is not None and text.grad.isfinite().all()


def test_perfect_matches_cost_nothing() -> None:
    image, pids = torch.eye(4, dtype=torch.float64), torch.arange(4)
    assert float(sdm_loss(image, image, pids, logit_scale=100.0)) == pytest.approx(0, abs=1e-6)
    assert float(itc_loss(image, image, logit_scale=100.0)) == pytest.approx(0, abs=1e-6)
    assert float(sdm_loss(image[:1], image[:1], pids[:1], logit_scale=50.0)) == pytest.approx(0, abs=1e-6)


# --- adaptive SDM -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def case(irra_golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return fmfa_case(irra_golden)


@pytest.mark.parametrize(
    "name, alpha",
    [
        ("asdm_head", 0.1),
        ("asdm_head_noweight", 0.0),
        ("asdm_v1_alpha10", 10.0),
        ("asdm_v1_alpha10", (10.0, 10.0)),
        ("asdm_v1_i2t10_t2i1", (10.0, 1.0)),
    ],
)
def test_adaptive_sdm_is_the_authors(name: str, alpha: float, case: dict[str, np.ndarray]) -> None:
    image, text, pids = leaf(case["img"]), leaf(case["txt"]), torch.from_numpy(case["pids"])
    loss = asdm_loss(image, text, pids, logit_scale=float(case["logit_scale"]), alpha=alpha)
    np.testing.assert_allclose(float(loss.detach()), case[name], rtol=2e-5)
    loss.backward()
    assert_gradient(image.grad, case[f"{name}__grad_img"])
    assert_gradient(text.grad, case[f"{name}__grad_txt"])


@pytest.mark.parametrize("alpha", [1, 10])
def test_adaptive_sdm_is_the_papers(alpha: int, case: dict[str, np.ndarray]) -> None:
    image, text = (torch.from_numpy(case[name]).double() for name in ("img", "txt"))
    options = {"alpha": alpha, "gap": "prob", "positive": "pair"}
    loss = asdm_loss(image, text, torch.from_numpy(case["pids"]), logit_scale=50.0, **options)
    assert float(loss) == pytest.approx(case[f"asdm_paper_alpha{alpha}"], rel=1e-10)


def loop_asdm(image, text, pids, scale, alphas, gap, positive):
    total = 0.0
    for a, b, alpha in ((image, text, alphas[0]), (text, image, alphas[1])):
        for i in range(len(pids)):
            scores = [cosine(a[i], b[j]) for j in range(len(pids))]
            same = [float(pid == pids[i]) for pid in pids]
            target = [value / sum(same) for value in same]
            logits = [scale * score for score in scores]
            measured = scores if gap == "cosine" else softmax(logits)
            mine = [measured[j] for j in range(len(pids)) if same[j]]
            chosen = {"first": mine[0], "pair": measured[i], "best": max(mine)}[positive]
            total += (1 + alpha * (max(measured) - chosen)) * divergence(logits, target, 1e-8) / len(pids)
    return total


@pytest.mark.parametrize("gap", ["cosine", "prob"])
@pytest.mark.parametrize("positive", ["first", "pair", "best"])
@pytest.mark.parametrize("seed", range(2))
def test_adaptive_sdm_equals_explicit_loops(gap, positive, seed: int) -> None:
    image, text, pids = random_pairs(seed)
    expected = loop_asdm(image.tolist(), text.tolist(), pids.tolist(), 20.0, (10.0, 3.0), gap, positive)
    loss = asdm_loss(image, text, pids, logit_scale=20.0, alpha=(10.0, 3.0), gap=gap, positive=positive)
    assert float(loss) == pytest.approx(expected, rel=1e-10)


def test_right_first_candidates_leave_plain_sdm_whatever_alpha_is() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.eye(6, 9, dtype=torch.float64) + 0.1 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    text = (image + 0.05 * torch.randn(6, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    plain = sdm_loss(image, text, torch.arange(6), logit_scale=5.0)
    (expected,) = torch.autograd.grad(plain, text)
    assert float(expected.abs().max()) > 1e-3
    for gap in ("cosine", "prob"):
        adaptive = asdm_loss(image, text, torch.arange(6), logit_scale=5.0, alpha=10.0, gap=gap)
        torch.testing.assert_close(adaptive, plain)
        torch.testing.assert_close(torch.autograd.grad(adaptive, text)[0], expected)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_positives_differ_only_where_an_identity_has_several_items(seed: int) -> None:
    image, text, pids = random_pairs(seed)
    first, pair, best = (
        asdm_loss(image, text, torch.arange(len(pids)), logit_scale=20.0, positive=positive, reduction="none")
        for positive in ("first", "pair", "best")
    )
    torch.testing.assert_close(first, pair)
    torch.testing.assert_close(first, best)
    per_pair = [
        asdm_loss(image, text, pids, logit_scale=20.0, positive=positive, reduction="none")
        for positive in ("best", "first", "pair")
    ]
    assert (per_pair[0] <= per_pair[1] + 1e-12).all() and (per_pair[0] <= per_pair[2] + 1e-12).all()


def test_an_earlier_item_of_the_identity_makes_its_pairs_unmatched_as_in_the_code() -> None:
    image = torch.eye(3, dtype=torch.float64)
    pids = torch.tensor([7, 7, 2])  # row 1 ranks its own caption first; the code takes item 0 as positive
    weights = asdm_loss(image, image, pids, logit_scale=5.0, alpha=10.0, reduction="none") / sdm_loss(
        image, image, pids, logit_scale=5.0, reduction="none"
    )
    torch.testing.assert_close(weights, torch.tensor([1.0, 11.0, 1.0], dtype=torch.float64))


def test_detached_weights_have_the_same_value_and_no_gradient_of_their_own(case: dict[str, np.ndarray]) -> None:
    pids, arguments = torch.from_numpy(case["pids"]), {"logit_scale": 50.0, "reduction": "none"}
    image, text = leaf(case["img"]), torch.from_numpy(case["txt"])
    flowing = asdm_loss(image, text, pids, detach=False, **arguments)
    detached = asdm_loss(image, text, pids, detach=True, **arguments)
    torch.testing.assert_close(detached, flowing)
    gradients = [torch.autograd.grad(loss.mean(), image)[0] for loss in (detached, flowing)]
    largest = float(gradients[1].abs().max())
    assert float((gradients[0] - gradients[1]).abs().max()) == pytest.approx(0.67 * largest, rel=0.02)
