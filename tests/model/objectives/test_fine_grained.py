"""Explicit fine-grained alignment: the authors' and the paper's values, explicit loops, symmetries, memory."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.efa import dense_matches
from model.objectives import fine_grained
from model.objectives.fine_grained import best_matches, efa_loss, sparse_aggregate, sparse_weights
from tests.helpers.configs import ROOT
from tests.helpers.golden import assert_gradient, close, fmfa_case, leaf
from tests.helpers.loops import cosine, dot
from tests.helpers.tasks import tiny_batch, tiny_task
from utils.batch import caption_mask

FMFA = ROOT / "configs/fmfa.yaml"
seeds = st.integers(0, 10_000)
EFA = {"margin_text": 0.2, "margin_image": 0.9, "temperature": 0.5}
each_variant = pytest.mark.parametrize("variant", ["code", "paper"])


@pytest.fixture(scope="session")
def case(irra_golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return fmfa_case(irra_golden)


def random_tokens(seed: int, pairs: int = 4, length: int = 3, patches: int = 5, dim: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text, image = (torch.randn(pairs, n, dim, generator=generator, dtype=torch.float64) for n in (length, patches))
    return text, image


# --- golden values ----------------------------------------------------------------------------------------------------


def test_aggregation_is_the_authors(case: dict[str, np.ndarray]) -> None:
    text, patches = torch.from_numpy(case["efa_text"]), torch.from_numpy(case["efa_patch"])
    close(sparse_weights(text, patches), case["efa_weights"], 1e-6)
    close(sparse_aggregate(text, patches), case["efa_agg"], 1e-5)


@pytest.mark.parametrize(
    "name, margin_text, margin_image, temperature",
    [("efa_head", 0.1, 0.9, 1.0), ("efa_v1_m01_01", 0.1, 0.1, 0.1), ("efa_v1_m02_10", 0.2, 1.0, 0.1)],
)
def test_alignment_is_the_authors(
    name: str, margin_text: float, margin_image: float, temperature: float, case: dict[str, np.ndarray]
) -> None:
    text, patches = leaf(case["efa_text"]), leaf(case["efa_patch"])
    options = {"margin_text": margin_text, "margin_image": margin_image, "temperature": temperature}
    loss = efa_loss(text, patches, **options)
    np.testing.assert_allclose(float(loss.detach()), case[name], rtol=2e-5)
    loss.backward()
    assert_gradient(text.grad, case[f"{name}__grad_text"])
    assert_gradient(patches.grad, case[f"{name}__grad_patch"])


@pytest.mark.parametrize(
    "name, tokens, margin, temperature",
    [
        ("efa_head_t2e", "efa_text", 0.1, 1.0),
        ("efa_head_v2e", "efa_patch", 0.9, 1.0),
        ("efa_head_t2e_temp05", "efa_text", 0.1, 0.5),
        ("efa_v1_t2e_m01", "efa_text", 0.1, 0.1),
    ],
)
def test_each_half_is_the_authors(
    name: str, tokens: str, margin: float, temperature: float, case: dict[str, np.ndarray]
) -> None:
    text, patches = torch.from_numpy(case["efa_text"]), torch.from_numpy(case["efa_patch"])
    joint = sparse_aggregate(text, patches)
    similarity = fine_grained.token_similarity(torch.from_numpy(case[tokens]), joint, temperature)
    np.testing.assert_allclose(fine_grained.alignment(similarity, margin, "code").mean(), case[name], rtol=2e-5)


@pytest.mark.parametrize("margins", [(0.1, 0.1), (0.2, 1.0), (0.2, 0.8)])
def test_alignment_is_the_papers(margins: tuple[float, float], case: dict[str, np.ndarray]) -> None:
    text, patches = (torch.from_numpy(case[name]).double() for name in ("efa_text", "efa_patch"))
    loss = efa_loss(text, patches, margin_text=margins[0], margin_image=margins[1], variant="paper")
    assert float(loss) == pytest.approx(case[f"efa_paper_t{margins[0]}_v{margins[1]}"], rel=1e-10)


@pytest.mark.parametrize(
    "pairs, margins, expected", [(64, (0.1, 0.1), 17.03), (64, (0.1, 0.9), 18.61), (128, (0.1, 0.9), 21.40)]
)
def test_random_tokens_give_the_constants_of_the_authors_logs(
    pairs: int, margins: tuple[float, float], expected: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    text, patches = (torch.randn(pairs, tokens, 256, generator=generator) for tokens in (24, 48))
    loss = efa_loss(text, patches, margin_text=margins[0], margin_image=margins[1])
    assert float(loss) == pytest.approx(expected, abs=0.05)


# --- explicit loops ---------------------------------------------------------------------------------------------------


def loop_aggregate(text, patches, sigma):
    joint = []
    for tokens, regions in zip(text, patches, strict=True):
        rows = []
        for token in tokens:
            scores = [dot(token, region) for region in regions]
            scaled = [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]
            kept = [score if score > sigma / len(regions) else 0.0 for score in scaled]
            rows.append(
                [
                    sum(k / sum(kept) * region[d] for k, region in zip(kept, regions, strict=True))
                    for d in range(len(token))
                ]
            )
        joint.append(rows)
    return joint


def loop_efa(text, patches, margins, temperature, sigma, variant):
    size, joint, total = len(text), loop_aggregate(text, patches, sigma), 0.0
    for tokens, margin in ((text, margins[0]), (patches, margins[1])):
        similarity = [
            [
                temperature * math.log(sum(math.exp(max(cosine(x, e) for e in ej) / temperature) for x in xi))
                for ej in joint
            ]
            for xi in tokens
        ]
        if variant == "code":
            similarity = [[value / math.sqrt(dot(row, row)) for value in row] for row in similarity]
        for a in range(size):  # column of the matrix in the code, anchor in the paper
            others = [b for b in range(size) if b != a]
            if variant == "code":
                first = [math.exp(similarity[b][a] - similarity[b][b] + margin) for b in others] + [1.0]
                second = [math.exp(similarity[b][a] - similarity[a][a] + margin) for b in others] + [1.0]
            else:
                first = [math.exp(similarity[a][b] - similarity[a][a] + margin) for b in others]
                second = [math.exp(similarity[b][a] - similarity[a][a] + margin) for b in others]
            total += (math.log(sum(first)) + math.log(sum(second))) / size
    return total


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("temperature, sigma", [(1.0, 1.0), (0.1, 1.0), (0.5, 2.5)])
def test_alignment_equals_explicit_loops(variant, temperature: float, sigma: float) -> None:
    text, patches = random_tokens(seed=3)
    expected = loop_efa(text.tolist(), patches.tolist(), (0.2, 0.9), temperature, sigma, variant)
    options = {"margin_text": 0.2, "margin_image": 0.9, "temperature": temperature, "sigma": sigma}
    assert float(efa_loss(text, patches, variant=variant, **options)) == pytest.approx(expected, rel=1e-10)


# --- properties -------------------------------------------------------------------------------------------------------


@each_variant
@settings(max_examples=20, deadline=None)
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_symmetries_of_the_alignment(variant, seed: int, factor: float) -> None:
    text, patches = random_tokens(seed)
    per_pair = efa_loss(text, patches, variant=variant, reduction="none", **EFA)
    assert per_pair.shape == (len(text),)
    torch.testing.assert_close(per_pair.mean(), efa_loss(text, patches, variant=variant, **EFA))
    generator = torch.Generator().manual_seed(seed)
    pairs, columns, regions = (
        torch.randperm(n, generator=generator) for n in (len(text), *map(len, (text[0], patches[0])))
    )
    shuffled = efa_loss(text[pairs], patches[pairs], variant=variant, reduction="none", **EFA)
    torch.testing.assert_close(shuffled, per_pair[pairs])
    shuffled = efa_loss(text[:, columns], patches[:, regions], variant=variant, reduction="none", **EFA)
    torch.testing.assert_close(shuffled, per_pair)
    torch.testing.assert_close(
        efa_loss(factor * text, 3 * factor * patches, variant=variant, reduction="none", **EFA), per_pair
    )


@each_variant
def test_masked_columns_are_as_if_they_were_not_there(variant) -> None:
    text, patches = random_tokens(0, length=5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 3:] = False
    text.requires_grad_()
    loss = efa_loss(text, patches, variant=variant, text_mask=mask, **EFA)
    torch.testing.assert_close(loss, efa_loss(text[:, :3], patches, variant=variant, **EFA))
    assert not torch.isclose(loss, efa_loss(text, patches, variant=variant, **EFA))
    (gradient,) = torch.autograd.grad(loss, text)
    assert (gradient[:, 3:] == 0).all() and gradient[:, :3].abs().min() > 0


@each_variant
def test_rows_without_preference_and_empty_captions_are_finite(variant) -> None:
    text, patches = (part.float() for part in random_tokens(0, length=4))
    text[1] = text[1, :1]  # all tokens are equal
    patches[1] = patches[1, :1]  # all patches are equal
    mask = caption_mask(torch.tensor([[9, 1, 2, 8], [9, 8, 0, 0], [9, 1, 8, 0], [0, 0, 0, 0]]))
    no_direction = text.clone(), patches.clone()
    no_direction[0][0, 1] = no_direction[1][2] = 0
    for tokens, largest in [((text, patches), 1e3), (no_direction, math.inf)]:
        for text_mask in (None, mask):
            leaves = [part.clone().requires_grad_() for part in tokens]
            loss = efa_loss(*leaves, variant=variant, text_mask=text_mask, **EFA)
            gradients = torch.autograd.grad(loss, leaves)
            assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
            assert max(float(gradient.abs().max()) for gradient in gradients) < largest


@each_variant
def test_one_pair_alone_costs_nothing(variant) -> None:
    text, patches = (part.requires_grad_() for part in random_tokens(0, pairs=1))
    loss = efa_loss(text, patches, variant=variant, **EFA)
    assert float(loss.detach()) == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (text, patches)))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 40, 10**9])  # one, two or all items of the batch at a time
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_and_dense_agree(block: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text, patches = (part.requires_grad_() for part in random_tokens(1, pairs=5, dim=6))
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) > 0.4 if masked else None
    if mask is not None:
        mask[:, 0] = True
    monkeypatch.setattr(fine_grained, "BLOCK", block)
    loss = efa_loss(text, patches, text_mask=mask, **EFA)
    gradients = torch.autograd.grad(loss, (text, patches))
    monkeypatch.setattr(fine_grained, "best_matches", dense_matches)
    dense = efa_loss(text, patches, text_mask=mask, **EFA)
    torch.testing.assert_close(loss, dense)
    for actual, expected in zip(gradients, torch.autograd.grad(dense, (text, patches)), strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(lambda *parts: best_matches(*parts, mask), (patches, text))


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_step_on_full_size_tokens_is_small_and_no_slower_than_dense() -> None:
    code = (
        "import gc, json, sys; gc.disable()  # imports are faster\n"
        "from benchmarks.efa import dense_matches, measure; gc.enable()\n"
        "from model.objectives.fine_grained import best_matches\n"
        "print(json.dumps(measure(vars()[sys.argv[1]], 40, 77, 192, 512)))"
    )
    busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    results = []
    for matches in ("best_matches", "dense_matches"):
        command = [sys.executable, "-c", code, matches]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        results.append(json.loads(run.stdout))
    (seconds, peak, value), (dense_seconds, dense_peak, dense_value) = results
    assert value == pytest.approx(dense_value, abs=1e-5)
    assert peak < 1000 and peak < dense_peak
    if busy:
        pytest.skip("memory is within bounds; seconds mean nothing while other programs hold the cores")
    assert seconds < dense_seconds


# --- in a task --------------------------------------------------------------------------------------------------------


def test_masking_padding_makes_the_loss_independent_of_it() -> None:
    alone = ["losses.mlm=null", "losses.asdm=null", "losses.id=null"]
    for option, padding_counts in [("false", True), ("true", False)]:
        task = tiny_task(*alone, f"losses.efa.mask_padding={option}", config=FMFA)
        assert task.full_text == padding_counts
        batch = tiny_batch(task)
        longer = batch | {"caption_ids": torch.nn.functional.pad(batch["caption_ids"], (0, 6))}
        difference = float((task(batch)[1]["efa_loss"] - task(longer)[1]["efa_loss"]).abs())
        assert difference > 1e-4 if padding_counts else difference < 1e-5


def test_fine_grained_alignment_reads_the_captions_that_the_other_losses_read() -> None:
    terms = []
    for option in ("false", "true"):
        task = tiny_task(f"losses.mlm.clean_captions={option}", config=FMFA)
        terms.append(task(tiny_batch(task))[1])
    assert not torch.allclose(terms[0]["efa_loss"], terms[1]["efa_loss"], atol=1e-5)


def test_fine_grained_alignment_is_fp32_under_autocast() -> None:
    task = tiny_task(config=FMFA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = task(tiny_batch(task))
    assert {total.dtype, *(value.dtype for value in terms.values())} == {torch.float32}
    torch.testing.assert_close(terms["efa_loss"], task(tiny_batch(task))[1]["efa_loss"], rtol=0.02, atol=0.02)
