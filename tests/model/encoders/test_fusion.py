"""Fusion with support sets: golden values of our specification, an explicit loop, invariances, and the encoders."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.build import build_task, needs_teacher
from model.encoders.fusion import Fusion, FusionEncoder, related_rows
from tests.helpers.configs import GOLDEN, tiny_config
from tests.helpers.golden import leaf
from tests.helpers.loaders import fields_of
from tests.helpers.tasks import loader_of, stir, task_of
from utils.errors import ConfigError

DIM, HEADS = 16, 4


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    stored = np.load(GOLDEN / "lcr2s_spec_public.npz")
    return {name.removeprefix("case0/"): stored[name] for name in stored.files}


def their_parameters(golden: dict[str, np.ndarray], kind: str) -> dict[str, Tensor]:
    """Golden parameters or gradients under our names, with query, key and value joined."""
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


# --- the layer --------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(found.sum(dim=3), torch.ones(5, 4, 1, dtype=torch.float64))
    assert not found[:, :, 0, 1:][~mask[:, None].expand(-1, 4, -1)].any()


def loop_fusion(fusion: Fusion, anchor: Tensor, support: list[Tensor]) -> np.ndarray:
    """Fusion of one sample in numpy, head by head."""
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
    torch.testing.assert_close(fusion(anchor, support[:, order], mask[:, order]), out, rtol=0, atol=1e-11)
    for rubbish in (math.nan, math.inf, 1e30):
        other = support.masked_fill(~mask[:, :, None], rubbish)
        assert torch.equal(fusion(anchor, other, mask), out)


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
    """M = 0, an empty mask for any M, and copies of the anchor as support give the same output."""
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
    """Output equals the anchor bitwise at zero initialisation; the output layers get a gradient in the first step."""
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
    assert rows.tolist() == [False, False, True, False, False]


# --- support from the batch -------------------------------------------------------------------------------------------


def test_rows_of_different_people_are_no_support() -> None:
    fusion, (anchor, support, mask) = random_fusion(), random_support()
    images, captions = related_rows(torch.arange(5), torch.arange(5), torch.arange(5))
    nothing = fusion(anchor, support[:, :0], mask[:, :0])
    torch.testing.assert_close(fusion.within(anchor, images), nothing)
    assert torch.equal(images, torch.eye(5).bool()) and torch.equal(captions, images)


def test_the_batch_as_support_equals_the_same_sets() -> None:
    """A repeated row does not support its own repetition."""
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


# --- the encoder with support sets ------------------------------------------------------------------------------------


def test_the_teacher_starts_as_the_baseline(root: Path) -> None:
    """Loss and tower gradients equal the baseline's at zero initialisation."""
    config = tiny_config("lcr2s_teacher", root)
    teacher = task_of(config)
    baseline = task_of(tiny_config("baseline", root, "losses.itc=null", "losses.sdm={}"), seed=1)
    baseline.load_state_dict(teacher.state_dict(), strict=False)
    batch = next(iter(fields_of(loader_of(config, teacher).epoch(1))))
    losses = [task(batch)[0] for task in (teacher, baseline)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    found = dict(teacher.named_parameters())
    for name, parameter in baseline.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    fusion = teacher.encoder.fusion["image"]  # type: ignore[index, union-attr]
    assert fusion.out.weight.grad.any() and not fusion.hidden.weight.grad.any()  # type: ignore[union-attr, operator]


def test_what_the_losses_see_is_enriched_and_what_is_evaluated_is_not(root: Path) -> None:
    config = tiny_config("lcr2s_teacher", root)
    task = task_of(config)
    encoder = task.encoder
    assert isinstance(encoder, FusionEncoder)
    stir(encoder.fusion)
    batch = next(iter(fields_of(loader_of(config, task).epoch(1))))
    step = task.gathered_step(batch)
    images = encoder.encode_image(batch["images"]).embedding
    supports = torch.zeros(*batch["support_image_mask"].shape, 64)
    supports[batch["support_image_mask"]] = encoder.encode_image(batch["support_images"]).embedding
    expected = encoder.fusion["image"](images, supports, batch["support_image_mask"])
    torch.testing.assert_close(step.image, expected)
    assert not torch.allclose(step.image, images)
    captions = torch.zeros(*batch["support_caption_mask"].shape, 64)
    captions[batch["support_caption_mask"]] = encoder.encode_text(batch["support_caption_ids"]).embedding
    text = encoder.encode_text(batch["caption_ids"]).embedding
    torch.testing.assert_close(step.text, encoder.fusion["text"](text, captions, batch["support_caption_mask"]))


def test_both_modalities_have_their_own_fusion(root: Path) -> None:
    encoder = task_of(tiny_config("lcr2s_teacher", root)).encoder
    assert isinstance(encoder, FusionEncoder)
    parameters = [set(map(id, encoder.fusion[tower].parameters())) for tower in ("image", "text")]
    assert not parameters[0] & parameters[1]


def test_the_support_may_go_without_gradient(root: Path) -> None:
    gradients = []
    for grad in ("true", "false"):
        config = tiny_config("lcr2s_teacher", root, f"model.support_grad={grad}")
        task = task_of(config)
        stir(task.encoder.fusion)  # type: ignore[arg-type]
        batch = next(iter(fields_of(loader_of(config, task).epoch(1))))
        calls: list[bool] = []
        encode = task.encoder.encode_image
        task.encoder.encode_image = lambda x, f=encode, c=calls: c.append(torch.is_grad_enabled()) or f(x)  # type: ignore[method-assign, misc, assignment]
        loss, _ = task(batch)
        loss.backward()
        assert calls == [True, grad == "true"]
        gradients.append(task.encoder.image.projection.weight.grad.clone())  # type: ignore[union-attr, operator]
    assert not torch.allclose(*gradients)


def test_a_batch_without_any_support_trains(root: Path) -> None:
    """Loss and gradients stay finite if no identity has another image or caption."""
    config = tiny_config("lcr2s_teacher", root)
    task = task_of(config)
    loader = loader_of(config, task)
    for of in (loader.pairs.supports.images_of, loader.pairs.supports.captions_of):  # type: ignore[union-attr]
        of.update({pid: pairs[:0] for pid, pairs in of.items()})
    loss, _ = task(next(iter(fields_of(loader.epoch(1)))))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in task.parameters())


def test_heads_must_divide_the_dimensions(root: Path) -> None:
    for heads in ("5", "0"):
        message = r"model\.heads: must be (a divisor of model\.embed_dim \(64\)|at least 1), got"
        with pytest.raises(ConfigError, match=message):
            build_task(tiny_config("lcr2s_teacher", root, f"model.heads={heads}"), 3)


# --- the encoder with support from the batch --------------------------------------------------------------------------


def test_the_joint_form_teaches_itself(root: Path) -> None:
    config = tiny_config("lcr2s_joint", root)
    task = task_of(config)
    assert config.model["name"] == "batch_fusion" and not needs_teacher(config)
    stir(task.encoder.fusion)  # type: ignore[arg-type]
    batch = next(iter(fields_of(loader_of(config, task).epoch(1))))
    step = task.gathered_step(batch)
    (plain, enriched), (_, texts) = (step.embeddings[0][0], step.embeddings[1][0]), step.embeddings[1]
    assert torch.equal(plain, task.encode_image(batch["images"]).embedding)
    assert step.teacher is not None and not step.teacher[0].requires_grad
    assert torch.equal(step.teacher[0], enriched) and torch.equal(step.teacher[1], texts)
    assert enriched.requires_grad and not torch.allclose(plain, enriched)
    loss, terms = task(batch)
    sdm = task.objectives["sdm"].pair_losses(step).mean(dim=1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(terms["sdm_loss"], sdm.sum().detach())  # summed over both embeddings
    loss.backward()
    assert task.encoder.fusion["image"].hidden.weight.grad.any()  # type: ignore[index, union-attr, operator]
