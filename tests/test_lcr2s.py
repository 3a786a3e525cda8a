"""LCR2S-style fusion and distillation: the spec's vectors and its invariants (numbers as in LCR2S spec 10.1)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.encoders.fusion import Fusion, related_rows
from model.objectives import OBJECTIVES, Facts
from model.objectives.distillation import feature_loss, relation_loss
from tests.conftest import GOLDEN
from tests.test_rde import step_of

DIM, HEADS = 16, 4


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    stored = np.load(GOLDEN / "lcr2s_spec_public.npz")
    return {name.removeprefix("case0/"): stored[name] for name in stored.files}


def leaf(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).clone().requires_grad_()


def their_parameters(golden: dict[str, np.ndarray], kind: str) -> dict[str, Tensor]:
    """The vectors' parameters or gradients by our names: query, key and value are one."""
    names = {"ln1": "norm1", "ln2": "norm2", "o": "attention.out_proj", "f1": "hidden", "f2": "out"}
    found = {
        f"{ours}.{part}": torch.from_numpy(golden[f"mhaf/{kind}/{theirs}.{part}"])
        for theirs, ours in names.items()
        for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        pieces = [torch.from_numpy(golden[f"mhaf/{kind}/{name}.{part}"]) for name in "qkv"]
        found[f"attention.in_proj_{part}"] = torch.cat(pieces)
    return found


def random_fusion(seed: int = 0) -> Fusion:
    torch.manual_seed(seed)
    fusion = Fusion(DIM, HEADS).double()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion


def random_support(seed: int = 0, size: int = 5, number: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randn(size, DIM, generator=generator, dtype=torch.float64)
    support = torch.randn(size, number, DIM, generator=generator, dtype=torch.float64)
    return anchor, support, torch.rand(size, number, generator=generator) < 0.6


# --- fusion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_fusion_is_the_specs(training: bool, golden: dict[str, np.ndarray]) -> None:
    fusion = Fusion(DIM, int(golden["mhaf/heads"])).double().train(training)
    fusion.load_state_dict(their_parameters(golden, "param"))
    anchor, support = leaf(golden["mhaf/anchor"]), leaf(golden["mhaf/support"])
    mask = torch.from_numpy(golden["mhaf/mask"])
    assert mask[0].all() and not mask[1].any()
    out = fusion(anchor, support, mask)
    np.testing.assert_allclose(out.detach(), golden["mhaf/out"], rtol=0, atol=1e-9)
    (out * torch.from_numpy(golden["mhaf/cotangent"])).sum().backward()
    for tensor, name in ((anchor, "anchor"), (support, "support")):
        np.testing.assert_allclose(tensor.grad, golden[f"mhaf/grad_{name}"], rtol=0, atol=1e-9)  # type: ignore[arg-type]
    for name, gradient in their_parameters(golden, "grad").items():
        np.testing.assert_allclose(fusion.get_parameter(name).grad, gradient, rtol=0, atol=1e-9, err_msg=name)  # type: ignore[arg-type]
    with torch.no_grad():
        np.testing.assert_allclose(fusion(anchor, support, mask), golden["mhaf/out"], rtol=0, atol=1e-9)


def test_attention_is_the_specs(golden: dict[str, np.ndarray]) -> None:
    fusion = Fusion(DIM, int(golden["mhaf/heads"])).double()
    fusion.load_state_dict(their_parameters(golden, "param"))
    support, mask = torch.from_numpy(golden["mhaf/support"]), torch.from_numpy(golden["mhaf/mask"])
    weights = []
    attend = fusion.attention.forward

    def spy(query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor | None]:
        found = attend(query, key, value, **{**options, "need_weights": True, "average_attn_weights": False})
        weights.append(found[1])
        return found

    fusion.attention.forward = spy  # type: ignore[method-assign, assignment]
    fusion(torch.from_numpy(golden["mhaf/anchor"]), support, mask)
    (found,) = weights
    np.testing.assert_allclose(found.squeeze(2).detach(), golden["mhaf/attn"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found.sum(dim=3), torch.ones(5, 4, 1, dtype=torch.float64))  # 3
    assert not found[:, :, 0, 1:][~mask[:, None].expand(-1, 4, -1)].any()  # 2


def loop_fusion(fusion: Fusion, anchor: Tensor, support: list[Tensor]) -> np.ndarray:
    """LCR2S spec 5 for one sample, head by head."""
    weights = {name: value.detach().numpy() for name, value in fusion.named_parameters()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    a = anchor.detach().numpy()
    normed = [norm(x, "norm1") for x in [a, *(row.detach().numpy() for row in support)]]
    projected = [weights["attention.in_proj_weight"] @ x + weights["attention.in_proj_bias"] for x in normed]
    edge, heads = DIM // HEADS, []
    for head in range(HEADS):
        part = slice(head * edge, (head + 1) * edge)
        query = projected[0][:DIM][part]
        logits = np.array([query @ x[DIM : 2 * DIM][part] / math.sqrt(edge) for x in projected])
        shares = np.exp(logits - logits.max())
        heads.append(sum(w * x[2 * DIM :][part] for w, x in zip(shares / shares.sum(), projected, strict=True)))
    u = a + weights["attention.out_proj.weight"] @ np.concatenate(heads) + weights["attention.out_proj.bias"]
    hidden = weights["hidden.weight"] @ norm(u, "norm2") + weights["hidden.bias"]
    hidden = hidden / (1 + np.exp(-1.702 * hidden))
    return u + weights["out.weight"] @ hidden + weights["out.bias"]


@pytest.mark.parametrize("seed", range(3))
def test_fusion_equals_an_explicit_loop(seed: int) -> None:
    fusion, (anchor, support, mask) = random_fusion(seed), random_support(seed)
    out = fusion(anchor, support, mask).detach().numpy()
    for row in range(len(anchor)):
        expected = loop_fusion(fusion, anchor[row], list(support[row][mask[row]]))
        np.testing.assert_allclose(out[row], expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_order_of_the_support_and_what_is_in_its_padding_do_not_matter(seed: int) -> None:
    fusion, (anchor, support, mask) = random_fusion(), random_support(seed)
    out = fusion(anchor, support, mask)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(fusion(anchor, support[:, order], mask[:, order]), out, rtol=0, atol=1e-11)  # 1
    for rubbish in (math.nan, math.inf, 1e30):
        other = support.masked_fill(~mask[:, :, None], rubbish)
        assert torch.equal(fusion(anchor, other, mask), out)  # 2


def test_padding_gets_no_gradient_and_gives_none() -> None:
    fusion, (anchor, support, mask) = random_fusion(), random_support(3)
    gradients = []
    for filling in (0.0, math.nan):
        fusion.zero_grad()
        given = support.masked_fill(~mask[:, :, None], filling).requires_grad_()
        fusion(anchor, given, mask).square().sum().backward()
        assert given.grad is not None and not given.grad[~mask].any() and given.grad[mask].any()
        gradients.append([parameter.grad.clone() for parameter in fusion.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_no_support_at_all() -> None:
    """4, 5: M = 0, an empty mask of any M, and a support of copies of the anchor are the same."""
    fusion, (anchor, support, _) = random_fusion(), random_support()
    anchor.requires_grad_()
    empty = torch.zeros(5, 3, dtype=torch.bool)
    nothing = fusion(anchor, support[:, :0], empty[:, :0])
    torch.testing.assert_close(fusion(anchor, support, empty), nothing)
    copies = anchor[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(fusion(anchor, copies, ~empty), nothing)
    (gradient,) = torch.autograd.grad(nothing.sum(), anchor)
    assert nothing.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(nothing[0].detach(), torch.from_numpy(loop_fusion(fusion, anchor[0], [])))


def test_it_starts_as_the_plain_embedding_and_moves_at_once() -> None:
    """6: bitwise at zero initialisation; the output layers get their gradient in the first step."""
    torch.manual_seed(0)
    fusion, (anchor, support, mask) = Fusion(DIM, HEADS).double(), random_support()
    assert torch.equal(fusion(anchor, support, mask), anchor)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    fusion(anchor, support, mask).square().sum().backward()
    moved = {name for name, parameter in fusion.named_parameters() if parameter.grad.any()}  # type: ignore[union-attr]
    assert moved == {"attention.out_proj.weight", "attention.out_proj.bias", "out.weight", "out.bias"}
    optimizer.step()
    assert not torch.equal(fusion(anchor, support, mask), anchor)


def test_a_row_depends_on_its_own_support_alone() -> None:
    fusion, (anchor, support, mask) = random_fusion(), random_support()
    mask[2] = True
    out = fusion(anchor, support, mask)
    changed = support.clone()
    changed[2, 1, 0] += 1
    rows = (fusion(anchor, changed, mask) - out).abs().sum(dim=1) > 1e-9
    assert rows.tolist() == [False, False, True, False, False]  # 7


# --- the other rows of a batch as support ---------------------------------------------------------------------------


def test_rows_of_different_people_are_no_support() -> None:
    fusion, (anchor, support, mask) = random_fusion(), random_support()
    images, captions = related_rows(torch.arange(5), torch.arange(5), torch.arange(5))
    nothing = fusion(anchor, support[:, :0], mask[:, :0])
    torch.testing.assert_close(fusion.within(anchor, images), nothing)  # 21
    assert torch.equal(images, torch.eye(5).bool()) and torch.equal(captions, images)


def test_the_batch_as_support_equals_the_same_sets() -> None:
    """22, 23: and a row that is repeated is no support of its repetition."""
    fusion, (anchor, _, _) = random_fusion(), random_support(size=7)
    pids = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    image_ids, index = torch.tensor([10, 10, 11, 20, 21, 21, 30]), torch.tensor([0, 1, 2, 3, 4, 4, 6])
    anchor[5] = anchor[4]
    for related, numbers in zip(related_rows(pids, image_ids, index), (image_ids, index), strict=True):
        out = fusion.within(anchor, related)
        for row in range(7):
            others = [i for i in range(7) if pids[i] == pids[row] and numbers[i] != numbers[row]]
            np.testing.assert_allclose(
                out[row].detach(), loop_fusion(fusion, anchor[row], [anchor[i] for i in others]), rtol=1e-9, atol=1e-9
            )


# --- distillation ---------------------------------------------------------------------------------------------------

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
    torch.testing.assert_close(features, 2 - cosines[0] - cosines[1])  # 10
    assert 0 <= features <= 4
    turn = torch.linalg.qr(random_sides(seed + 1, 6)[0]).Q
    torch.testing.assert_close(relation_loss(image @ turn, text @ turn, their_image, their_text), relations)  # 11
    assert not torch.isclose(feature_loss(image @ turn, text @ turn, their_image, their_text), features)
    torch.testing.assert_close(relation_loss(text, image, their_text, their_image), relations)  # 12
    torch.testing.assert_close(relation_loss(scale * image, text, their_image, scale * their_text), relations)
    torch.testing.assert_close(feature_loss(scale * image, text, their_image, scale * their_text), features)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    image, text, *_ = (side.requires_grad_() for side in random_sides(0))
    for loss in (feature_loss, relation_loss):
        value = loss(image, text, image, text)
        gradients = torch.autograd.grad(value, (image, text))
        assert float(value.detach()) < 1e-20 and all(gradient.abs().max() < 1e-12 for gradient in gradients)  # 9


def test_features_are_pulled_along_the_sphere() -> None:
    image, text, *teacher = random_sides(1)
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(feature_loss(image, text, *teacher), image)
    assert ((gradient * image).sum(dim=1).abs() < 1e-12).all()  # 14
    unit, target = F.normalize(image.detach()), F.normalize(teacher[0])
    cosine = (unit * target).sum(dim=1, keepdim=True)
    expected = -(target - cosine * unit) / image.detach().norm(dim=1, keepdim=True) / len(image)
    torch.testing.assert_close(gradient, expected)


def test_a_teacher_of_other_dimensions_gives_relations_only() -> None:
    image, text, *_ = random_sides(0)
    wide = random_sides(1, dim=9)[:2]
    assert relation_loss(image, text, *wide).isfinite()


def test_objectives_and_their_options() -> None:
    facts, sides = Facts(num_pids=3, embed_dim=6, vocab_size=9), random_sides(2)
    step = step_of((sides[0], sides[1]), pids=torch.arange(5))
    step = type(step)(**{**vars(step), "teacher": (sides[2], sides[3])})
    features, relations = OBJECTIVES.get("distill_features", ""), OBJECTIVES.get("distill_relations", "")
    assert features(facts).weight == 1 and relations(facts).weight == 10
    torch.testing.assert_close(features(facts)(step)[0], feature_loss(*sides))
    torch.testing.assert_close(features(facts, normalize=False)(step)[0], feature_loss(*sides, normalize=False))
    torch.testing.assert_close(relations(facts)(step)[0], relation_loss(*sides))
