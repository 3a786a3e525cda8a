"""The task: captions that each loss reads, passes through the text tower, weights of losses, precision."""

import pytest
import torch
from torch import Tensor

from configs.schema import load_config
from model.build import build_encoder
from model.objectives import OBJECTIVES, Step
from model.task import RetrievalTask
from model.teacher import Teacher
from tests.helpers.configs import ROOT, TINY
from tests.helpers.tasks import VOCAB, tiny_batch, tiny_task, with_teacher
from utils.precision import matmul_precision

FMFA = ROOT / "configs/fmfa.yaml"


def record_calls(monkeypatch: pytest.MonkeyPatch, task: RetrievalTask) -> list[Tensor]:
    calls: list[Tensor] = []
    encode = task.encoder.encode_text
    monkeypatch.setattr(task.encoder, "encode_text", lambda ids: calls.append(ids) or encode(ids))
    return calls


def test_faithful_mode_runs_the_text_tower_once_on_the_masked_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    assert "caption_ids" not in task.inputs  # fields that no loss reads are not made
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
            task = with_teacher(task, Teacher(build_encoder(load_config(ROOT / "configs/baseline.yaml", TINY))))
        total, terms = task(tiny_batch(task))
        total.backward()
        assert total.isfinite() and f"{name}_loss" in terms
        gradients = [p.grad for n, p in task.named_parameters() if n.startswith("encoder.text.projection")]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), name


def test_losses_are_fp32_under_autocast() -> None:
    task = tiny_task()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, terms = task(tiny_batch(task))
        step = task.gathered_step(tiny_batch(task))
    assert step.image_tokens.dtype == torch.bfloat16  # the towers run in half precision
    assert {total.dtype, *(value.dtype for value in terms.values()), step.image.dtype} == {torch.float32}
    exact, _ = task(tiny_batch(task))
    torch.testing.assert_close(total, exact, rtol=0.05, atol=0.1)


def test_products_of_losses_stay_exact_where_those_of_towers_are_not() -> None:
    task, seen = tiny_task(), {}
    for name, objective in task.named_objectives():
        objective.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: torch.get_float32_matmul_precision()})
        )
    with matmul_precision("medium"):
        task(tiny_batch(task))
    assert seen == {"sdm": "highest", "id": "highest", "mlm": "medium"}  # mlm has a transformer


def test_an_empty_caption_trains_without_nan() -> None:
    task = tiny_task()
    batch = tiny_batch(task)
    batch["mlm_ids"][0] = torch.tensor([VOCAB - 2, VOCAB - 3] + [0] * 8)  # the end token is masked
    total, _ = task(batch)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_a_last_batch_of_one_pair_is_finite() -> None:
    task = tiny_task()
    total, _ = task(tiny_batch(task, size=1))
    assert total.isfinite()


@pytest.mark.parametrize("clean, field", [("true", "caption_ids"), ("false", "mlm_ids")])
def test_a_step_has_the_captions_and_tokens_of_its_embeddings(clean: str, field: str) -> None:
    task = tiny_task(f"losses.mlm.clean_captions={clean}", config=FMFA)
    step = task.gathered_step(tiny_batch(task))
    assert torch.equal(step.caption_ids, step.batch[field])
    end_of_text = step.text_tokens[torch.arange(len(step.text)), step.caption_ids.argmax(dim=1)]
    torch.testing.assert_close(end_of_text, step.text)


def test_a_missing_batch_field_names_the_loss_that_needs_it() -> None:
    task = tiny_task()
    batch = tiny_batch(task)
    for name, key in (("mlm_positions", r"losses\.mlm"), ("mlm_ids", r"losses\.mlm"), ("images", "model")):
        incomplete = {field: value for field, value in batch.items() if field != name}
        with pytest.raises(ValueError, match=rf"^{key}: needs the batch field '{name}' \(\w+ \(.*, got .*pids"):
            task(incomplete)


def test_a_step_can_be_built_from_embeddings_alone() -> None:
    image, text = torch.randn(3, 4), torch.randn(3, 4)
    step = Step.from_embeddings(image, text, torch.arange(3), logit_scale=50.0)
    assert step.image is image and step.text is text and step.logit_scale == 50 and step.teacher is None
    with pytest.raises(RuntimeError, match="must set reads_tokens = True"):
        _ = step.image_tokens
