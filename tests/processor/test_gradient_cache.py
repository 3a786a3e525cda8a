"""GradCache: a batch in micro-batches gives the loss and the gradients of the whole batch."""

from pathlib import Path

import pytest
import torch

from processor import training
from processor.gradient_cache import backward
from tests.helpers.configs import METHODS, config_of
from tests.helpers.runs import lines_of
from tests.helpers.steps import exact_task, micro_batches_of, same_step, step_of, take_gradients

CPU = torch.device("cpu")


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_the_whole_batch(method: str, parts: int, root: Path) -> None:
    """The last batch has 2 pairs, so a third micro-batch holds a dummy sample only."""
    more = ["data.batch_size=10"] if "ivt" not in method and "joint" not in method else []
    config = config_of(method, root, *more)
    for number in [0, -1] if config.data.sampler == "random" else [0]:
        in_parts = step_of(config_of(method, root, *more, f"train.accumulate={parts}"), number)
        same_step(in_parts, step_of(config, number))


@pytest.mark.parametrize("weights", [{"sdm": 0, "id": 0}, {"mlm": 0}, {"id": 0}], ids=str)
def test_losses_without_weight_are_logged_and_have_no_gradient(weights: dict[str, int], root: Path) -> None:
    more = [f"losses.{name}.weight={weight}" for name, weight in weights.items()]
    whole, in_parts = (step_of(config_of("irra", root, *more, f"train.accumulate={n}"), 0) for n in (1, 2))
    same_step(in_parts, whole)


def test_token_losses_are_means_over_micro_batches_weighted_by_pairs(root: Path) -> None:
    more = ["losses.asdm=null", "losses.id=null", "losses.mlm=null", "data.batch_size=7"]
    config = config_of("fmfa", root, *more, "train.accumulate=2")
    task, expected = exact_task(config_of("fmfa", root, *more)), 0.0
    micro_batches = micro_batches_of(config, task, 0)
    for fields, _ in micro_batches:
        loss, _ = task(fields)
        (loss * len(fields["pids"]) / 7).backward()
        expected += float(loss.detach()) * len(fields["pids"]) / 7
    total, gradients, _ = step_of(config, 0)
    assert [shard.num_pairs for _, shard in micro_batches] == [4, 3] and total == pytest.approx(expected, rel=1e-10)
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(torch.from_numpy(gradients[name]), parameter.grad, rtol=1e-9, atol=1e-13)


def test_random_draws_of_the_encoder_are_the_same_in_both_passes(root: Path) -> None:
    """Compare with one graph through all micro-batches; IVT draws its masks and dropout in the model."""
    config = config_of("ivt", root, "train.accumulate=2", "model.drop_path=0.3")
    task = exact_task(config).train()
    micro_batches = micro_batches_of(config, task, 0)
    torch.manual_seed(3)
    rows = [task.encode(fields)[0] for fields, _ in micro_batches]
    whole = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    expected, _ = task.losses(task.step(whole))
    expected.backward()
    gradients = take_gradients(task)
    torch.manual_seed(3)
    total, _ = backward(task, micro_batches, device=CPU, precision="fp32", scale=lambda loss: 8 * loss)
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-12)
    for name, gradient in take_gradients(task).items():
        torch.testing.assert_close(gradient, 8 * gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("more", [[], ["data.workers=1", "train.precision=bf16"]], ids=" ".join)
def test_a_run_in_micro_batches_is_the_run(more: list[str], root: Path, tmp_path: Path) -> None:
    options = ["train.epochs=2", "solver.lr=2e-4", "solver.eps=1e-6", *more]
    for parts in (1, 3):
        training.train(config_of("irra", root, *options, f"train.accumulate={parts}"), tmp_path / str(parts))
    tolerance = 2e-2 if "train.precision=bf16" in more else 1e-4
    for one, other in zip(lines_of(tmp_path / "1"), lines_of(tmp_path / "3"), strict=True):
        assert set(one) == set(other)
        for name in ("loss", "sdm_loss", "id_loss", "mlm_loss", "mlm_acc"):
            assert other[name] == pytest.approx(one[name], rel=tolerance)


def test_a_loss_on_embeddings_that_reads_tokens_is_an_error_not_a_wrong_number(root: Path, monkeypatch) -> None:
    config = config_of("irra", root, "train.accumulate=2")
    task = exact_task(config)
    monkeypatch.setattr(type(task.objectives["sdm"]), "forward", lambda self, step: (step.text_tokens.sum(), {}))
    with pytest.raises(RuntimeError, match="must set reads_tokens = True"):
        backward(task, micro_batches_of(config, task, 0), device=CPU, precision="fp32", scale=lambda loss: loss)
