"""The task: which captions each loss sees, how often the text tower runs, what is built and what is not."""

import pytest
import torch
from torch import Tensor

from configs.schema import load_config
from model.build import build_encoder, build_task
from model.objectives import OBJECTIVES
from model.task import RetrievalTask
from model.teacher import Teacher
from tests.conftest import ROOT, TINY
from utils.batch import Batch

IRRA = ROOT / "configs/irra.yaml"
VOCAB = 1024


def tiny_task(*overrides: str, config=IRRA) -> RetrievalTask:
    torch.manual_seed(0)
    return build_task(load_config(config, [*TINY, *overrides]), num_pids=5)


def tiny_batch(task: RetrievalTask, size: int = 4, length: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB - 3, (size, length), generator=generator)
    ids[:, 0], ids[:, -1] = VOCAB - 2, VOCAB - 1
    labels = torch.zeros_like(ids)
    labels[:, 2] = ids[:, 2]
    masked = torch.where(labels != 0, VOCAB - 3, ids)
    batch = {
        "images": torch.randn(size, 3, 64, 32, generator=generator),
        "pids": torch.tensor([0, 1, 1, 4])[:size],
        "caption_ids": ids,
        "mlm_ids": masked,
        "mlm_labels": labels,
        "mlm_positions": labels.flatten().nonzero().squeeze(1),
    }
    return {name: value for name, value in batch.items() if name in task.inputs}


def record_calls(monkeypatch: pytest.MonkeyPatch, task: RetrievalTask) -> list[Tensor]:
    calls: list[Tensor] = []
    encode = task.encoder.encode_text
    monkeypatch.setattr(task.encoder, "encode_text", lambda ids: calls.append(ids) or encode(ids))
    return calls


def test_faithful_mode_runs_the_text_tower_once_on_the_masked_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    assert "caption_ids" not in task.inputs  # nobody makes or moves what nobody reads
    batch, calls = tiny_batch(task), record_calls(monkeypatch, task)
    task(batch)
    assert len(calls) == 1 and torch.equal(calls[0], batch["mlm_ids"])


def test_clean_mode_runs_both_kinds_of_captions_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("losses.mlm.clean_captions=true")
    batch, calls = tiny_batch(task), record_calls(monkeypatch, task)
    task(batch)
    assert len(calls) == 1
    assert torch.equal(calls[0], torch.cat([batch["caption_ids"], batch["mlm_ids"]]))


def test_the_switch_changes_what_the_global_losses_see_and_nothing_else() -> None:
    faithful, clean = tiny_task(), tiny_task("losses.mlm.clean_captions=true")
    _, masked_terms = faithful(tiny_batch(faithful))
    _, clean_terms = clean(tiny_batch(clean))
    torch.testing.assert_close(masked_terms["mlm_loss"], clean_terms["mlm_loss"])
    assert not torch.allclose(masked_terms["sdm_loss"], clean_terms["sdm_loss"])
    without = tiny_task("losses.mlm=null")
    _, terms = without(tiny_batch(without))
    torch.testing.assert_close(terms["sdm_loss"], clean_terms["sdm_loss"])


def test_without_mlm_there_is_no_head_and_no_masking() -> None:
    task = tiny_task("losses.mlm=null")
    assert task.inputs == {"images", "pids", "caption_ids"}
    assert not [name for name, _ in task.named_parameters() if "mlm" in name or "cross" in name]


def test_the_mlm_head_runs_on_labelled_positions_only() -> None:
    task = tiny_task()
    rows = []
    for module in task.objectives["mlm"].mlm_head:  # type: ignore[union-attr]
        module.register_forward_hook(lambda module, args, output: rows.append(output.shape))  # type: ignore[union-attr]
    batch = tiny_batch(task)
    task(batch)
    labelled = int((batch["mlm_labels"] != 0).sum())
    assert {shape[0] for shape in rows} == {labelled} and rows[-1] == (labelled, VOCAB)


def test_total_is_the_weighted_sum_of_unweighted_terms() -> None:
    task = tiny_task("losses.sdm.weight=0.5", "losses.id.weight=2", "losses.mlm.weight=3")
    total, terms = task(tiny_batch(task))
    expected = 0.5 * terms["sdm_loss"] + 2 * terms["id_loss"] + 3 * terms["mlm_loss"]
    torch.testing.assert_close(total.detach(), expected)
    assert set(terms) == {"sdm_loss", "id_loss", "img_acc", "txt_acc", "mlm_loss", "mlm_acc"}
    assert not any(value.requires_grad for value in terms.values())


def test_weight_zero_is_logged_and_not_trained() -> None:
    task = tiny_task("losses.id.weight=0")
    total, terms = task(tiny_batch(task))
    total.backward()
    assert float(terms["id_loss"]) == pytest.approx(torch.log(torch.tensor(5.0)).item(), rel=0.05)
    assert task.objectives["id"].classifier.weight.grad is None  # type: ignore[union-attr]
    torch.testing.assert_close(total.detach(), terms["sdm_loss"] + terms["mlm_loss"])


def test_a_loss_of_weight_zero_may_be_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("losses.id.weight=0")
    forward = type(task.objectives["id"]).forward
    monkeypatch.setattr(
        type(task.objectives["id"]), "forward", lambda self, step: (forward(self, step)[0] * float("nan"), {})
    )
    total, terms = task(tiny_batch(task))
    assert total.isfinite() and terms["id_loss"].isnan()


def test_every_registered_loss_trains_alone() -> None:
    for name in OBJECTIVES:
        task = tiny_task("losses.itc=null", f"losses.{name}={{}}", config=ROOT / "configs/baseline.yaml")
        if OBJECTIVES.get(name, "").needs_teacher:
            torch.manual_seed(7)
            task.learn_from(Teacher(build_encoder(load_config(ROOT / "configs/baseline.yaml", TINY))))
        total, terms = task(tiny_batch(task))
        total.backward()
        assert total.isfinite() and f"{name}_loss" in terms
        gradients = [p.grad for n, p in task.named_parameters() if n.startswith("encoder.text.projection")]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), name


def test_losses_are_fp32_under_autocast() -> None:
    task = tiny_task()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = task(tiny_batch(task))
        step = task.encode(tiny_batch(task))
    assert step.image_tokens.dtype == torch.bfloat16  # the towers do run in half precision
    assert {total.dtype, *(value.dtype for value in terms.values()), step.image.dtype} == {torch.float32}
    exact, _ = task(tiny_batch(task))
    torch.testing.assert_close(total, exact, rtol=0.05, atol=0.1)


def test_an_empty_caption_trains_without_nan() -> None:
    task = tiny_task()
    batch = tiny_batch(task)
    batch["mlm_ids"][0] = torch.tensor([VOCAB - 2, VOCAB - 3] + [0] * 8)  # its end token was masked
    total, _ = task(batch)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_a_last_batch_of_one_pair_is_finite() -> None:
    task = tiny_task()
    total, _ = task(tiny_batch(task, size=1))
    assert total.isfinite()
