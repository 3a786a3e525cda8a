"""Training step of a task: gradients of a batch on all processes, clipping, optimizer, averaged weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from configs.schema import Config
from datasets.loaders import EvalLoaders
from model.objectives import Metrics
from model.task import RetrievalTask
from processor.evaluator import Embeddings, embed
from processor.gradient_cache import backward
from processor.moving_average import MovingAverage
from processor.passes import Passes, ReplicatedPasses, shard
from solver.optimizer import build_optimizer, load_state
from utils.batch import MicroBatch
from utils.distributed import world_size
from utils.placement import gathered
from utils.precision import matmul_precision


def process_notes(config: Config) -> list[str]:
    """Remarks for the log on a config that does not suit the number of processes."""
    notes, micro_batches, size = [], world_size() * config.train.accumulate, config.data.batch_size
    if size < micro_batches:
        notes.append(
            f"data.batch_size: {size} pairs are fewer than {micro_batches} micro-batches ({world_size()} processes, "
            f"train.accumulate={config.train.accumulate}), so some of these have no pair; use fewer"
        )
    if config.train.shard == "full" and world_size() == 1:
        notes.append("train.shard: has no effect with one process")
    return notes


class Engine:
    """A task with its optimizer, in one or several processes.

    Args:
        task: the task with its weights; moves to `device`.
        config: resolved config of the run.
        device: device of the steps.
    """

    def __init__(self, task: RetrievalTask, config: Config, device: torch.device) -> None:
        self.task, self.config, self.device = task, config, device
        passes, several = Passes(task), world_size() > 1
        if several and config.train.shard == "full":
            shard(passes, task.encoder.blocks, device)
        passes.to(device)
        self.passes = ReplicatedPasses(passes) if several and not passes.sharded else passes
        self.optimizer = build_optimizer(config.solver, task.named_parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.average: MovingAverage | None = None  # of the encoder's weights
        if config.train.ema is not None:
            self.average = MovingAverage(task.encoder, config.train.ema)

    def backward(self, batch: Sequence[MicroBatch]) -> tuple[Tensor, Metrics]:
        """Gradients of a batch, averaged over processes; returns loss and metrics as `RetrievalTask.forward`."""
        with matmul_precision(self.config.train.matmul):
            return backward(
                self.task,
                [micro_batch.to(self.device) for micro_batch in batch],
                device=self.device,
                precision=self.config.train.precision,
                scale=self.scaler.scale,
                passes=self.passes,
            )

    def update(self) -> None:
        """Change the weights by the gradients, and clear these."""
        if self.config.train.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.task.parameters(), self.config.train.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()

    def embed(self, loaders: EvalLoaders) -> Embeddings:
        """Encode a split with the current weights."""
        dummy = None
        if self.passes.sharded:
            images = torch.zeros(1, 3, *self.config.data.image_size, device=self.device)
            dummy = {"images": images, "caption_ids": torch.ones(1, 3, dtype=torch.int64, device=self.device)}
        return embed(self.task.encoder, loaders, self.device, self.config.train.precision, self.passes, dummy)

    def weights(self) -> dict[str, Tensor]:
        """State dict of the task, as `gathered` returns it."""
        return gathered(self.task.state_dict())

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The averaged ones of the task's encoder, if there are any."""
        if self.average is None:
            return None
        return gathered({f"encoder.{name}": value for name, value in self.average.weights().items()})

    def state_dict(self) -> dict[str, Any]:
        """State besides the weights, which does not depend on the number of processes; a collective."""
        return {
            "optimizer": gathered(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else gathered(self.average.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the entries of a `state_dict`."""
        load_state(self.optimizer, state["optimizer"]["state"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:  # None if --force has switched it on
            self.average.load_state_dict(state["average"])
