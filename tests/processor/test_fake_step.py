"""processor/fake_step.py: operations and memory of a step on fake tensors, against those of a real step."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from processor.fake_step import KINDS, FakeStep, _Memory
from processor.gradient_cache import backward
from processor.random_batch import micro_batches_of, random_batch, rows_per_pair
from solver.optimizer import build_optimizer
from tests.helpers.configs import config_of, tiny_config, write_yaml
from tests.helpers.tasks import task_of
from utils.config import to_yaml

CPU = torch.device("cpu")
CHECKPOINTING = ("model.image.checkpointing=true", "model.text.checkpointing=true")


def step_of(config) -> FakeStep:
    return FakeStep(config, num_pids=8, num_pairs=32, device=CPU)


def peak(config, pairs: int = 8) -> dict[str, int]:
    step = step_of(config)
    return dict(step.memory(step.batch(pairs)))


@pytest.mark.parametrize("method, parts", [("baseline", 1), ("fmfa", 1), ("irra", 2), ("lcr2s_joint", 2)])
def test_operations_and_peak_are_those_of_a_real_step(method: str, parts: int, root) -> None:
    config = config_of(method, root, f"train.accumulate={parts}")
    step = step_of(config)
    cost = step.cost(step.batch(6))
    task = task_of(config).train()
    optimizer = build_optimizer(config.solver, task.named_parameters())
    batch = micro_batches_of(random_batch(config, 6, 1024, task.inputs), parts, rows_per_pair(config))
    memory = _Memory()
    for tensor in (*task.parameters(), *task.buffers(), *(value for part in batch for value in part.fields.values())):
        memory.add(tensor)
    for _ in range(2):  # the first step makes the state of the optimizer
        memory.start()
        with FlopCounterMode(display=False) as flops, memory:
            backward(task, batch, device=CPU, precision="fp32", scale=lambda loss: loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert cost.flops == flops.get_total_flops() > 0
    assert cost.peak == pytest.approx(sum(memory.peak.values()), rel=0.01)


def test_memory_is_counted_by_kind(root) -> None:
    config = config_of("irra", root)
    step = step_of(config)
    parameters = sum(parameter.nbytes for parameter in step.task.parameters())
    buffers = sum(buffer.nbytes for buffer in step.task.buffers())
    batch = step.batch(8)
    found = step.memory(batch)
    assert tuple(found) == KINDS
    assert found["weights"] == parameters + buffers
    steps_of_adam = 4 * len(list(step.task.parameters()))
    assert found["optimizer"] == 2 * parameters + steps_of_adam
    assert found["batch"] == sum(value.nbytes for value in batch[0].fields.values())
    assert found["activations"] > 0 and found["losses"] > 0
    assert step.memory(batch) == found  # nothing is left over from a step
    sgd = step_of(config_of("irra", root, "solver.optimizer=sgd"))
    assert sgd.memory(sgd.batch(8))["optimizer"] == parameters


def test_options_that_save_memory_do_so(root) -> None:
    whole = sum(peak(config_of("baseline", root), 64).values())
    deep = config_of("baseline", root, "model.image.options.depth=4")
    for options in (["train.accumulate=4"], ["train.precision=bf16"]):
        assert sum(peak(config_of("baseline", root, *options), 64).values()) < whole
    recomputed = config_of("baseline", root, "model.image.options.depth=4", *CHECKPOINTING)
    assert peak(recomputed, 64)["activations"] < 0.5 * peak(deep, 64)["activations"]


def test_the_state_of_random_numbers_stays_real(root) -> None:
    with step_of(config_of("baseline", root))._faking("temporary"):
        copy = torch.get_rng_state().clone()  # as torch.cuda.set_rng_state does
    assert not isinstance(copy, FakeTensor) and torch.equal(copy, torch.get_rng_state())


def test_averaged_weights_and_clipping_are_counted(root) -> None:
    plain, more = (peak(config_of("baseline", root, *options)) for options in ([], ["train.ema=0.9"]))
    assert more["weights"] > 1.9 * plain["weights"]
    assert sum(peak(config_of("baseline", root, "train.clip_grad=1")).values()) >= sum(plain.values())


def test_a_teacher_without_checkpoint_is_built_from_its_config(root, tmp_path) -> None:
    teacher = write_yaml(tmp_path, "teacher.yaml", to_yaml(tiny_config("lcr2s_teacher", root)))
    weights = []
    for cache in ("false", "true"):
        step = step_of(tiny_config("lcr2s", root, f"teacher.config={teacher}", f"teacher.cache={cache}"))
        weights.append(step.memory(step.batch(4))["weights"])
    assert weights[0] > 1.5 * weights[1]  # a cached teacher is its tables alone


@pytest.mark.parametrize("name", ["ivt", "rde", "lcr2s_teacher"])
def test_further_methods_go_through(name: str, root) -> None:
    step = step_of(config_of(name, root))
    assert step.cost(step.batch(4)).flops > 0
