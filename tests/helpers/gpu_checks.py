"""Checks of a GPU, which a CPU can run as well: numbers, precisions, compiled code, the optimizer, processes, speed."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.schema import Config
from model.build import build_task
from processor.engine import Engine
from processor.fake_step import FakeStep
from processor.gradient_cache import backward
from processor.meters import Meters
from processor.random_batch import micro_batches_of, random_batch
from processor.trainer import Trainer
from solver.optimizer import build_optimizer, set_lr
from tests.helpers.golden import golden_batch, golden_task
from utils.batch import MicroBatch
from utils.distributed import peak_memory, rank
from utils.sharding import Shard

OUTPUTS = {"image_feats": ("image", "tokens"), "encode_text": ("text", "embedding")}


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions without TF32, which GPUs use by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@contextlib.contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """Fail at an operator that makes the host wait for the GPU; a CPU has none."""
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def golden_error(device: torch.device, golden: dict[str, np.ndarray]) -> float:
    """Largest difference of embeddings and tokens to those of IRRA's authors."""
    task, batch = golden_task(golden).to(device), golden_batch(golden)
    with exact_products(), torch.no_grad():
        found = {
            "image": task.encode_image(batch["images"].to(device)),
            "text": task.encode_text(batch["caption_ids"].to(device)),
        }
    differences = [
        (getattr(found[side], kind).cpu() - torch.from_numpy(golden[f"out/{name}"])).abs().max()
        for name, (side, kind) in OUTPUTS.items()
    ]
    return float(max(differences))


class Gradients(NamedTuple):
    """Loss and gradients of a step."""

    loss: float
    gradients: dict[str, Tensor]

    def error(self, other: "Gradients") -> float:
        """Largest relative difference of the loss, and of the norm of all gradients."""
        norm, change = self.gradients, {name: other.gradients[name] - value for name, value in self.gradients.items()}
        total, difference = (
            torch.stack([value.norm() for value in values.values()]).norm() for values in (norm, change)
        )
        return max(abs(other.loss / self.loss - 1), float(difference / total))

    @property
    def finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.gradients.values())


def golden_step(
    device: torch.device, golden: dict[str, np.ndarray], precision: str = "fp32", parts: str = "none"
) -> Gradients:
    """A step of the golden model.

    Args:
        device: device of the step.
        golden: golden vectors of IRRA.
        precision: autocast precision.
        parts: parts to compile.
    """
    task, batch = golden_task(golden).to(device), golden_batch(golden)
    task.compile_parts(parts)  # type: ignore[arg-type]
    scale = 2.0**10 if precision == "fp16" else 1.0
    micro_batch = MicroBatch(batch, Shard((len(batch["pids"]),))).to(device)
    with exact_products():
        loss, _ = backward(task, [micro_batch], device=device, precision=precision, scale=lambda loss: scale * loss)
    found = {name: p.grad.cpu() / scale for name, p in task.named_parameters() if p.grad is not None}
    return Gradients(float(loss), found)


def optimizer_error(device: torch.device, config: Config) -> float:
    """Largest difference of the weights after three fused updates to those of single-tensor updates."""
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        task = build_task(config, num_pids=8, weights=False, teacher=False)
        gradients = [torch.randn_like(parameter) for parameter in task.parameters()]
        task.to(device)
        optimizer = build_optimizer(config.solver, task.named_parameters())
        for group in optimizer.param_groups:
            group |= {} if fused else {"fused": False, "foreach": False}
        set_lr(optimizer, lambda base: base)
        for _ in range(3):
            for parameter, gradient in zip(task.parameters(), gradients, strict=True):
                parameter.grad = gradient.to(device)
            optimizer.step()
        weights.append([parameter.detach().cpu() for parameter in task.parameters()])
    return max(float((one - other).abs().max()) for one, other in zip(*weights, strict=True))


def steps_without_waits(trainer: Trainer, number: int = 2) -> float:
    """Train steps in which the host must not wait; returns the mean loss."""
    device, meters = trainer.device, Meters()
    trainer.task.train()
    batches = [batch for _, batch in zip(range(number + 1), trainer.train.epoch(1), strict=False)]
    for place, batch in enumerate(batches):
        with waits_are_errors(device) if place else contextlib.nullcontext():  # the first step sets up libraries
            loss, metrics = trainer.engine.backward(batch)
            trainer.engine.update()
            meters.update({"loss": loss, **metrics}, 1)
    return meters.read()["loss"]


def gathered(kind: str) -> tuple[list[float], list[float]]:
    """In two processes: the gathered rows, and the gradient of this process's rows."""
    rows = torch.full((rank() + 1, 1), float(rank()), device=kind, requires_grad=True)
    values = Shard((1, 2)).gather({"rows": rows})["rows"]
    (values * torch.arange(1.0, 4.0, device=kind)[:, None]).sum().backward()
    assert rows.grad is not None
    return values.flatten().tolist(), rows.grad.flatten().tolist()


class Speed(NamedTuple):
    """Throughput of a training step, and its peak memory in GiB beside the preflight's."""

    pairs_per_second: float
    memory: float | None
    predicted: float


def speed(config: Config, device: torch.device, pairs: int, steps: int = 10) -> Speed:
    """Measure whole training steps with random weights and random batches, after three that warm up."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    task = build_task(config, 1000, weights=False, teacher=False).train()
    engine = Engine(task, config, device)
    task.compile_parts(config.train.compile)
    fields = random_batch(config, pairs, task.encoder.vocab_size, task.inputs, device=device)
    micro_batches = micro_batches_of(fields, config.train.accumulate)
    start = time.perf_counter()
    for number in range(3 + steps):
        if number == 3:
            wait_for(device)
            start = time.perf_counter()
        engine.backward(micro_batches)
        engine.update()
    wait_for(device)
    seconds, memory = time.perf_counter() - start, peak_memory(device)
    fake = FakeStep(config, 1000, 1000, device)
    return Speed(pairs * steps / seconds, memory, fake.cost(fake.batch(pairs)).peak / 2**30)
