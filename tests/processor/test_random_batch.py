"""processor/random_batch.py: batches that every method trains on, as a whole and in micro-batches."""

from pathlib import Path

import pytest
import torch

from processor.gradient_cache import backward
from processor.random_batch import micro_batches_of, random_batch, rows_per_pair
from tests.helpers.configs import METHODS, config_of
from tests.helpers.steps import exact_task, take_gradients

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", [*METHODS, "fmfa", "lcr2s_teacher"])
def test_a_random_batch_has_the_fields_of_every_method(method: str, root: Path) -> None:
    config = config_of(method, root)
    task = exact_task(config)
    for _, objective in task.named_objectives():
        objective.clean_mask = None
    batch = random_batch(config, 4, task.encoder.vocab_size, task.inputs, columns=12)
    assert batch.keys() == task.inputs
    exact = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    per_pair = rows_per_pair(config)
    whole, _ = backward(task, micro_batches_of(exact, 1, per_pair), device=CPU, precision="fp32", scale=lambda x: x)
    gradients = take_gradients(task)
    parts = micro_batches_of(exact, 3, per_pair)
    assert [len(part.fields["pids"]) for part in parts] == [2 * per_pair, per_pair, per_pair]
    if method == "fmfa":  # efa compares within a micro-batch
        return
    total, _ = backward(task, parts, device=CPU, precision="fp32", scale=lambda x: x)
    assert float(total) == pytest.approx(float(whole), rel=1e-9)
    for name, gradient in take_gradients(task).items():
        assert torch.allclose(gradient, gradients[name], rtol=1e-6, atol=1e-9), name
