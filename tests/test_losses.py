"""Each loss against its authors' values and gradients, explicit loops in float64, and its symmetries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.objectives.identity import id_loss
from model.objectives.masked_language import mlm_loss
from model.objectives.matching import cmpm_loss, itc_loss, sdm_loss

MATCHING = {
    "sdm": lambda image, text, pids, scale=50.0, **options: sdm_loss(image, text, pids, logit_scale=scale, **options),
    "itc": lambda image, text, pids, scale=50.0, **options: itc_loss(image, text, logit_scale=scale, **options),
    "cmpm": lambda image, text, pids, scale=50.0, **options: cmpm_loss(image, text, pids, **options),
}


def leaf(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).requires_grad_()


def assert_gradient(actual: Tensor | None, expected: np.ndarray) -> None:
    assert actual is not None
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", MATCHING)
def test_matching_losses_are_the_authors(name: str, irra_golden: dict[str, np.ndarray]) -> None:
    image, text = leaf(irra_golden["case0/img"]), leaf(irra_golden["case0/txt"])
    pids, scale = torch.from_numpy(irra_golden["case0/pids"]), float(irra_golden["case0/logit_scale"])
    loss = MATCHING[name](image, text, pids, scale)
    np.testing.assert_allclose(float(loss.detach()), irra_golden[f"case0/{name}"], rtol=2e-5)
    loss.backward()
    assert_gradient(image.grad, irra_golden[f"case0/{name}__grad_img"])
    assert_gradient(text.grad, irra_golden[f"case0/{name}__grad_txt"])


def test_id_loss_is_the_authors(irra_golden: dict[str, np.ndarray]) -> None:
    image, text = leaf(irra_golden["case0/id_img_logits"]), leaf(irra_golden["case0/id_txt_logits"])
    loss = id_loss(image, text, torch.from_numpy(irra_golden["case0/pids"]))
    np.testing.assert_allclose(float(loss.detach()), irra_golden["case0/id"], rtol=2e-5)
    loss.backward()
    assert_gradient(image.grad, irra_golden["case0/id__grad_img_logits"])
    assert_gradient(text.grad, irra_golden["case0/id__grad_txt_logits"])


def test_mlm_loss_is_the_authors(irra_golden: dict[str, np.ndarray]) -> None:
    scores, labels = leaf(irra_golden["case0/mlm_scores"]), torch.from_numpy(irra_golden["case0/mlm_labels"])
    loss = mlm_loss(scores, labels)
    np.testing.assert_allclose(float(loss.detach()), irra_golden["case0/mlm"], rtol=2e-5)
    loss.backward()
    assert_gradient(scores.grad, irra_golden["case0/mlm__grad_scores"])
    accuracy = (scores.argmax(1) == labels)[labels != 0].float().mean()
    np.testing.assert_allclose(float(accuracy), irra_golden["case0/mlm_acc"], rtol=1e-6)


# --- explicit loops -------------------------------------------------------------------------------------------------


def random_pairs(seed: int, size: int = 7, dim: int = 5, people: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return image, text, torch.randint(people, (size,), generator=generator)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def divergence(logits: list[float], target: list[float], eps: float) -> float:
    return sum(p * (math.log(p) - math.log(q + eps)) for p, q in zip(softmax(logits), target, strict=True))


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


def test_id_and_mlm_losses_equal_explicit_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([3, 0, 8, 0, 1, 3])
    rows = [(scores.tolist(), label) for logits in (image, text) for scores, label in zip(logits, labels, strict=True)]
    expected = sum(-math.log(softmax(scores)[label]) for scores, label in rows) / len(rows)
    assert float(id_loss(image, text, labels)) == pytest.approx(expected, rel=1e-10)
    predicted = [(scores, label) for scores, label in rows[:6] if label != 0]  # 0 = not to be predicted
    expected = sum(-math.log(softmax(scores)[label]) for scores, label in predicted) / len(predicted)
    assert float(mlm_loss(image, labels)) == pytest.approx(expected, rel=1e-10)


# --- properties -----------------------------------------------------------------------------------------------------

seeds = st.integers(0, 10_000)
each_loss = pytest.mark.parametrize("name", MATCHING)


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
    # All probabilities halve. SDM's target halves with them, so that only eps weighs double; CMPM's falls by sqrt(2)
    # in either direction; ITC has two equal candidates where it had one.
    torch.testing.assert_close(MATCHING["sdm"](*twice), MATCHING["sdm"](*once, eps=2e-8))
    torch.testing.assert_close(MATCHING["cmpm"](*twice), MATCHING["cmpm"](*once, eps=2**0.5 * 1e-8) - math.log(2))
    torch.testing.assert_close(MATCHING["itc"](*twice), MATCHING["itc"](*once) + math.log(2))


@each_loss
@pytest.mark.parametrize("scale", [1.0, 50.0, 100.0])
def test_extreme_inputs_give_finite_losses_and_gradients(name: str, scale: float) -> None:
    image, text, pids = (part.float() if part.is_floating_point() else part for part in random_pairs(0))
    text = -image  # every pair as far apart as can be
    image[0] = 0  # an embedding without direction
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
