"""Two processes: gradients are averaged once a batch, and sharded parameters give the numbers of unsharded ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from configs.schema import Config
from datasets.annotations import load_annotations
from datasets.loaders import build_eval_loaders, data_tokenizer
from processor.engine import Engine
from processor.passes import ReplicatedPasses
from solver.optimizer import set_lr
from tests.helpers.configs import config_of
from tests.helpers.processes import together
from tests.helpers.steps import exact_task, micro_batches_of
from utils.batch import MicroBatch
from utils.distributed import mean_over_processes, rank
from utils.placement import gathered, local

CPU = torch.device("cpu")

# --- replicated parameters --------------------------------------------------------------------------------------------


class Replicated(NamedTuple):
    """Result of steps on one process."""

    find_unused: bool
    alike: bool  # gradients of all processes
    missing: list[str]  # parameters without gradient
    reductions: list[int]  # of each step


def _replicated(configs: list[Config]) -> list[Replicated]:
    results = []
    for config in configs:
        task = exact_task(config)
        engine = Engine(task, config, CPU)
        assert isinstance(engine.passes, ReplicatedPasses)
        reductions: list[int] = []
        for number in range(2):
            engine.optimizer.zero_grad()
            reductions.append(0)
            engine.backward(micro_batches_of(config, task, number))
            assert engine.passes.wrapped is not None
            if number == 0:
                engine.passes.wrapped.register_comm_hook(reductions, _counted)
        found = {name: one.grad for name, one in task.named_parameters() if one.grad is not None}
        gradients = torch.cat([value.flatten() for value in found.values()])
        largest = gradients.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        alike = torch.equal(gradients, largest)
        missing = [name for name, _ in task.named_parameters() if name not in found]
        results.append(Replicated(engine.passes.wrapped.find_unused_parameters, alike, missing, reductions[1:]))
    return results


def _counted(reductions: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    reductions[-1] += 1
    return allreduce_hook(None, bucket)


def test_gradients_are_averaged_once_a_batch_and_unused_parameters_looked_for_where_there_are_any(root: Path) -> None:
    cases: dict[tuple[str, ...], bool] = {
        (): False,
        ("losses.id.weight=0",): True,  # its classifier has no gradient
        ("train.accumulate=2",): True,  # the last backward pass does not reach the classifier
        ("train.accumulate=2", "losses.id=null"): False,
    }
    configs = [config_of("irra", root, *more) for more in cases]
    for results in together(2, _replicated, configs):
        for (more, find_unused), found in zip(cases.items(), results, strict=True):
            classifier = [f"objectives.id.classifier.{kind}" for kind in ("weight", "bias")]
            assert found.missing == (classifier if "losses.id.weight=0" in more else []), more
            assert found.alike and found.find_unused is find_unused, more
            assert found.reductions == results[0].reductions, more


# --- sharded parameters -----------------------------------------------------------------------------------------------


def _steps(configs: list[Config]) -> list[dict[str, Any]]:
    """Two steps of the optimizer: the first loss and gradients, and everything that a checkpoint holds."""
    results = []
    for config in configs:
        task = exact_task(config)
        engine = Engine(task, config, CPU)
        set_lr(engine.optimizer, lambda _: 1e-2)
        batch, numbers = micro_batches_of(config, task, 0), {}
        for number in range(2):
            total, _ = engine.backward(batch)
            if number == 0:
                gradients = {name: one.grad for name, one in task.named_parameters() if one.grad is not None}
                numbers = {f"gradient.{name}": value.clone() for name, value in gathered(gradients).items()}
                numbers["loss"] = mean_over_processes(total)
            engine.update()
        numbers |= {f"weight.{name}": value for name, value in engine.weights().items()}
        numbers |= {f"average.{name}": value for name, value in (engine.averaged_weights() or {}).items()}
        for place, state in engine.state_dict()["optimizer"]["state"].items():
            numbers |= {f"optimizer.{place}.{name}": value for name, value in state.items() if value is not None}
        size = sum(local(one).numel() for one in task.parameters()) / sum(one.numel() for one in task.parameters())
        results.append({"numbers": {name: value.detach().numpy() for name, value in numbers.items()}, "size": size})
    return results


def test_sharded_steps_are_those_without_sharding(root: Path) -> None:
    """Compare with clipping and averaged weights: IVT runs each block twice, and RDE's processes have dummy samples."""
    more = ["train.ema=0.9", "train.clip_grad=0.5"]
    configs = [
        config_of("irra", root, *more, "model.image.checkpointing=true", "model.text.checkpointing=true"),
        config_of("ivt", root, *more),  # with SGD
        config_of("rde", root, *more, "train.accumulate=5"),
        config_of("lcr2s_joint", root, *more, "train.accumulate=2"),
    ]
    sharded = [config_of_shard(config) for config in configs]
    first, second = together(2, _steps, [*configs, *sharded])
    plain, found = first[: len(configs)], first[len(configs) :]
    for one, other, elsewhere in zip(plain, found, second[len(configs) :], strict=True):
        assert one["size"] == 1 and 0.4 < other["size"] < 0.6 and 0.4 < elsewhere["size"] < 0.6
        assert set(one["numbers"]) == set(other["numbers"])
        for name, value in one["numbers"].items():
            assert abs(other["numbers"][name] - value).max() <= 1e-10 * max(abs(value).max(), 1e-3), name


def config_of_shard(config: Config) -> Config:
    """The config with sharded parameters."""
    return replace(config, train=replace(config.train, shard="full"))


def _embedded(config: Config, numbers: list[int]) -> list[list[Any]]:
    task = exact_task(config).float()
    engine, annotations = Engine(task, config, CPU), load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024)
    results = []
    for number in numbers:
        loaders = build_eval_loaders(config.data, annotations.train[:number], tokenizer, batch_size=1, pin_memory=False)
        embeddings = engine.embed(loaders)
        results.append([embeddings.gallery.numpy(), embeddings.query.numpy()])
    return results


def test_processes_with_fewer_images_keep_pace_in_the_evaluation(root: Path) -> None:
    """The second process has one image less, or none at all."""
    config = config_of_shard(config_of("irra", root))
    expected = _embedded(config, [3, 1])
    for found in together(2, _embedded, config, [3, 1]):
        for one, other in zip(expected, found, strict=True):
            for rows, others in zip(one, other, strict=True):
                assert rows.shape == others.shape and abs(rows - others).max() < 1e-5


def _overflow(config: Config) -> tuple[float, bool]:
    """Loss scale after a step in which one process has an infinite gradient, and True if no weight has changed."""
    task = exact_task(config).float()
    engine = Engine(task, config, CPU)
    set_lr(engine.optimizer, lambda _: 1e-3)
    ((fields, shard),) = micro_batches_of(config, task, 0)
    fields = {name: value.float() if value.is_floating_point() else value for name, value in fields.items()}
    before = [local(one).clone() for one in task.parameters()]
    engine.backward([MicroBatch(fields, shard)])
    if rank() == 1:
        gradients = (local(one.grad) for one in task.parameters() if one.grad is not None)
        next(gradient for gradient in gradients if gradient.numel()).fill_(torch.inf)
    engine.update()
    same = all(torch.equal(local(one), value) for one, value in zip(task.parameters(), before, strict=True))
    return engine.scaler.get_scale(), same


@pytest.mark.parametrize("clip", ["null", 0.5])
def test_an_overflow_of_one_process_skips_the_step_of_all(clip: object, root: Path) -> None:
    config = config_of_shard(config_of("irra", root, "train.precision=fp16", f"train.clip_grad={clip}"))
    assert together(2, _overflow, config) == [(2.0**15, True)] * 2
