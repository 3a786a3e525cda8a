"""What saves memory changes no number: a batch in parts, activations that are computed again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import train as train_program
from benchmarks import memory
from model.encoders import Encoded
from model.global_batch import Read, join
from model.task import RetrievalTask
from processor.gradient_cache import backward
from tests.test_distributed import METHODS, config_of, lines_of, parts_of, same_step, step_of, task_of
from utils.config import to_yaml
from utils.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_the_whole_batch(method: str, parts: int, root: Path) -> None:
    """Also of the last batch, which has 2 pairs: a third part is a stand-in."""
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


def test_token_losses_are_means_over_the_parts_weighted_by_pairs(root: Path) -> None:
    more = ["losses.asdm=null", "losses.id=null", "losses.mlm=null", "data.batch_size=7"]
    task = task_of(config_of("fmfa", root, *more))
    parts = parts_of(config_of("fmfa", root, *more, "train.accumulate=2"), task, 0)
    expected = 0.0
    for part in parts:
        loss, _ = task({name: value for name, value in part.items() if name != "shards"})
        (loss * len(part["pids"]) / 7).backward()
        expected += float(loss.detach()) * len(part["pids"]) / 7
    total, gradients, _ = step_of(config_of("fmfa", root, *more, "train.accumulate=2"), 0)
    assert [len(part["pids"]) for part in parts] == [4, 3] and total == pytest.approx(expected, rel=1e-10)
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(torch.from_numpy(gradients[name]), parameter.grad, rtol=1e-9, atol=1e-13)


def test_what_the_encoder_draws_is_the_same_in_both_passes(root: Path) -> None:
    """Against one graph through all parts; IVT's masks and its dropout are drawn in the model."""
    config = config_of("ivt", root, "train.accumulate=2", "model.drop_path=0.3")
    task = task_of(config).train()
    parts = parts_of(config, task, 0)
    torch.manual_seed(3)
    reads = [task.read(part) for part in parts]
    _, batch = join([detached(read) for read in reads], parts)
    image, text = (torch.cat([getattr(read, side).embedding for read in reads]) for side in ("image", "captions"))
    absent = torch.empty(0, device="meta")
    whole = Read(Encoded(image, absent), Encoded(text, absent), dict.fromkeys(task.text_fields, absent), None)
    expected, _ = task.losses(task.step(whole, batch))
    expected.backward()
    gradients = take_gradients(task)
    torch.manual_seed(3)
    total, _ = backward(task, parts, device=CPU, precision="fp32", scale=lambda loss: 8 * loss)
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-12)
    for name, gradient in take_gradients(task).items():
        torch.testing.assert_close(gradient, 8 * gradients[name], rtol=1e-9, atol=1e-12)


def detached(read: Read) -> Read:
    def plain(side: Encoded) -> Encoded:
        return Encoded(side.embedding.detach(), side.tokens)

    return read._replace(image=plain(read.image), captions=plain(read.captions))


def take_gradients(task: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}
    task.zero_grad()
    return found


@pytest.mark.parametrize("more", [[], ["data.workers=1", "train.precision=bf16"]], ids=" ".join)
def test_a_run_in_parts_is_the_run(more: list[str], root: Path, tmp_path: Path) -> None:
    options = ["train.epochs=2", "solver.lr=2e-4", "solver.eps=1e-6", *more]
    for parts in (1, 3):
        train_program.train(config_of("irra", root, *options, f"train.accumulate={parts}"), tmp_path / str(parts))
    tolerance = 2e-2 if "train.precision=bf16" in more else 1e-4
    for one, other in zip(lines_of(tmp_path / "1"), lines_of(tmp_path / "3"), strict=True):
        assert set(one) == set(other)
        for name in ("loss", "sdm_loss", "id_loss", "mlm_loss", "mlm_acc"):
            assert other[name] == pytest.approx(one[name], rel=tolerance)


def test_a_loss_of_whole_batches_that_reads_tokens_is_an_error_not_a_wrong_number(root: Path, monkeypatch) -> None:
    config = config_of("irra", root, "train.accumulate=2")
    task = task_of(config)
    monkeypatch.setattr(type(task.objectives["sdm"]), "forward", lambda self, step: (step.text_tokens.sum(), {}))
    with pytest.raises((RuntimeError, NotImplementedError)):
        total, _ = backward(task, parts_of(config, task, 0), device=CPU, precision="fp32", scale=lambda loss: loss)
        float(total)


def test_batch_statistics_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.accumulate: .*batch statistics.*model\.bn=frozen"):
        task_of(config_of("rde", root, "model.bn=batch", "train.accumulate=2"))


# --- activations that are computed again ------------------------------------------------------------------------------

DEEPER = {  # than the tests' towers, with dropout where there can be
    "irra": ["model.image.options.depth=3", "model.text.options.num_hidden_layers=3"],
    "rde": ["model.image.options.depth=3", "model.text.options.num_hidden_layers=3"],
    "ivt": ["model.image.options.depth=3", "model.drop_path=0.3"],
}


def kept(task: RetrievalTask, batch: dict[str, Tensor]) -> int:
    """Numbers that the graph of the towers keeps."""
    count = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal count
        count += value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        task.read(batch)
    return count


@pytest.mark.parametrize(
    "method, towers", [("irra", "image"), ("irra", "text"), ("rde", "image text"), ("ivt", "image")]
)
def test_checkpointing_keeps_less_and_changes_no_gradient(method: str, towers: str, root: Path) -> None:
    plain = config_of(method, root, *DEEPER[method])
    config = config_of(
        method, root, *DEEPER[method], *(f"model.{tower}.checkpointing=true" for tower in towers.split())
    )
    found = []
    for one in (plain, config):
        task = task_of(one).train()
        (batch,) = parts_of(one, task, 0)
        torch.manual_seed(4)
        total, _ = task(batch)
        total.backward()
        found.append((float(total.detach()), take_gradients(task), kept(task, batch)))
        task.eval()
        with torch.no_grad():
            task.encoder.encode_image(batch["images"])
    (total, gradients, numbers), (other, others, less) = found
    assert other == total and less < 0.9 * numbers
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-12, atol=1e-15)


def test_checkpointing_goes_with_parts(root: Path) -> None:
    more = ["model.image.checkpointing=true", "model.text.checkpointing=true", "train.accumulate=2"]
    same_step(step_of(config_of("rde", root, *more), 0), step_of(config_of("rde", root), 0))


def test_the_benchmark_of_memory_has_a_row_for_each_way(root: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(config_of("baseline", root)))
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *args: function(*args))
    rows = memory.table(str(tmp_path / "tiny.yaml"), [], 4, [1, 2]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["whole", "in 2 parts", "whole, checkpointing", "in 2 parts, checkpointing"]
    assert len({row[-1] for row in cells}) == 1  # the loss
