"""Distillation losses: golden values of our specification, explicit loops, symmetries."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.objectives import OBJECTIVES, Metadata
from model.objectives.distillation import feature_loss, relation_loss
from tests.helpers.golden import golden_case, leaf
from tests.helpers.objectives import objective_step


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_case("lcr2s_spec_public.npz")


SIDES = ("student_image", "student_text", "teacher_image", "teacher_text")


@pytest.mark.parametrize(
    "name, loss",
    [
        ("fd_normalized", feature_loss),
        ("fd_raw_mean", lambda *sides: feature_loss(*sides, normalize=False)),
        ("rd", relation_loss),
    ],
)
def test_distillation_losses_are_the_specs(name: str, loss, golden: dict[str, np.ndarray]) -> None:
    sides = [leaf(golden[f"distill/{side}"]) for side in SIDES]
    value = loss(*sides)
    np.testing.assert_allclose(float(value.detach()), golden[f"distill/{name}"], rtol=1e-9)
    value.backward()
    for tensor, side in zip(sides[:2], SIDES, strict=False):
        np.testing.assert_allclose(tensor.grad, golden[f"distill/{name}/grad_{side}"], rtol=0, atol=1e-9)  # type: ignore[arg-type]
    assert sides[2].grad is None and sides[3].grad is None


def random_sides(seed: int, size: int = 5, dim: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in SIDES]


@pytest.mark.parametrize("seed", range(3))
def test_distillation_losses_equal_explicit_loops(seed: int) -> None:
    sides = random_sides(seed)
    units = [[row / math.sqrt(sum(x * x for x in row)) for row in side.numpy()] for side in sides]
    size = len(sides[0])
    features = sum(((units[m][i] - units[m + 2][i]) ** 2).sum() for m in (0, 1) for i in range(size)) / size / 2
    assert float(feature_loss(*sides)) == pytest.approx(features, rel=1e-10)
    plain = sum(((sides[m][i] - sides[m + 2][i]) ** 2).mean() for m in (0, 1) for i in range(size)) / size / 2
    assert float(feature_loss(*sides, normalize=False)) == pytest.approx(float(plain), rel=1e-10)
    relations = sum(
        (units[0][i] @ units[1][j] - units[2][i] @ units[3][j]) ** 2 for i in range(size) for j in range(size)
    )
    assert float(relation_loss(*sides)) == pytest.approx(relations / size**2, rel=1e-10)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_symmetries_of_distillation(seed: int, scale: float) -> None:
    image, text, their_image, their_text = random_sides(seed)
    features, relations = (
        feature_loss(image, text, their_image, their_text),
        relation_loss(image, text, their_image, their_text),
    )
    cosines = [F.cosine_similarity(image, their_image).mean(), F.cosine_similarity(text, their_text).mean()]
    torch.testing.assert_close(features, 2 - cosines[0] - cosines[1])
    assert 0 <= features <= 4
    turn = torch.linalg.qr(random_sides(seed + 1, 6)[0]).Q
    torch.testing.assert_close(relation_loss(image @ turn, text @ turn, their_image, their_text), relations)
    assert not torch.isclose(feature_loss(image @ turn, text @ turn, their_image, their_text), features)
    torch.testing.assert_close(relation_loss(text, image, their_text, their_image), relations)
    torch.testing.assert_close(relation_loss(scale * image, text, their_image, scale * their_text), relations)
    torch.testing.assert_close(feature_loss(scale * image, text, their_image, scale * their_text), features)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    image, text, *_ = (side.requires_grad_() for side in random_sides(0))
    for loss in (feature_loss, relation_loss):
        value = loss(image, text, image, text)
        gradients = torch.autograd.grad(value, (image, text))
        assert float(value.detach()) < 1e-20 and all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_features_are_pulled_along_the_sphere() -> None:
    image, text, *teacher = random_sides(1)
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(feature_loss(image, text, *teacher), image)
    assert ((gradient * image).sum(dim=1).abs() < 1e-12).all()
    unit, target = F.normalize(image.detach()), F.normalize(teacher[0])
    cosine = (unit * target).sum(dim=1, keepdim=True)
    expected = -(target - cosine * unit) / image.detach().norm(dim=1, keepdim=True) / len(image)
    torch.testing.assert_close(gradient, expected)


def test_a_teacher_of_other_dimensions_gives_relations_only() -> None:
    image, text, *_ = random_sides(0)
    wide = random_sides(1, dim=9)[:2]
    assert relation_loss(image, text, *wide).isfinite()


def test_objectives_and_their_options() -> None:
    facts, sides = Metadata(num_pids=3, embed_dim=6, vocab_size=9), random_sides(2)
    step = objective_step((sides[0], sides[1]), pids=torch.arange(5))
    step = type(step)(**{**vars(step), "teacher": (sides[2], sides[3])})
    features, relations = OBJECTIVES.get("distill_features", ""), OBJECTIVES.get("distill_relations", "")
    assert features(facts).weight == 1 and relations(facts).weight == 10
    torch.testing.assert_close(features(facts)(step)[0], feature_loss(*sides))
    torch.testing.assert_close(features(facts, normalize=False)(step)[0], feature_loss(*sides, normalize=False))
    torch.testing.assert_close(relations(facts)(step)[0], relation_loss(*sides))
