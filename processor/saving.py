"""Checkpoints of a run: `last.pt` to resume from, and the weights of the best and of all epochs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import Config
from processor.reporting import EMA, best_record
from utils.checkpoint import save_checkpoint
from utils.config import to_yaml
from utils.distributed import rank
from utils.errors import TrainingError
from utils.version import VERSION

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Weights = Mapping[str, Tensor]


class RunCheckpoints:
    """Writer of a run's checkpoints, in the first process.

    Args:
        run: run folder.
        config: resolved config of the run.
        inputs: name -> hash of the files that the run is trained on.
    """

    def __init__(self, run: Path, config: Config, inputs: Mapping[str, str]) -> None:
        self.run, self.config, self.inputs = run, config, dict(inputs)

    def save_weights(self, history: Sequence[Mapping[str, Any]], weights: Weights, averaged: Weights | None) -> None:
        """Write the weights of an epoch that has ended, where `train.keep` asks for them.

        Args:
            history: records of all epochs so far.
            weights: state dict of the task.
            averaged: the same with averaged weights, if there are any.
        """
        record, split, keep = history[-1], self.config.eval.select_on, self.config.train.keep
        if rank() or keep == "last":
            return
        kept: list[tuple[str, Weights]] = [(f"epoch_{record['epoch']:03}", weights)] if keep == "all" else []
        if record is best_record(history, split):
            kept.append(("best", weights))
        if averaged is not None and record is best_record(history, split + EMA):
            kept.append(("best_ema", averaged))
        for name, values in kept:
            content = {"model": in_precision(values, self.config.train.save_precision)}
            save_checkpoint(self.run / f"{name}.pt", self._content(record) | content)

    def save_last(self, record: Mapping[str, Any], weights: Weights, training: Mapping[str, Any]) -> None:
        """Write `last.pt`.

        Args:
            record: record of the last epoch that has ended, or an empty one.
            weights: state dict of the task.
            training: training state to resume from.

        Raises:
            TrainingError: a weight or the optimizer is not finite; the file is left as it was.
        """
        lasting = {"model": weights, **{name: training.get(name) for name in ("optimizer", "average")}}
        names, tensors = zip(*floating(lasting), strict=True)  # the mean of a loss with weight 0 may be NaN
        device = tensors[0].device  # one transfer to the host instead of one per tensor
        finite = torch.stack([tensor.isfinite().all().to(device) for tensor in tensors]).cpu()
        if not finite.all():
            broken = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
            raise TrainingError(
                f"{len(broken)} of {len(names)} tensors of the model and its optimizer are not finite "
                f"({', '.join(broken[:3])}); {self.run / 'last.pt'} is left as it was"
            )
        if rank() == 0:
            content = self._content(record) | {"model": weights, "training": training}
            save_checkpoint(self.run / "last.pt", content)

    def _content(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "version": VERSION,
            "epoch": record.get("epoch", 0),  # completed epochs
            "config": to_yaml(self.config),
            "inputs": self.inputs,
            "metrics": dict(record),
        }


def in_precision(weights: Weights, precision: str) -> dict[str, Tensor]:
    """The weights in a precision of `DTYPES`; a tensor that would overflow stays as it is."""
    dtype = DTYPES[precision]
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    return {name: value if value.isfinite().all() else weights[name] for name, value in cast.items()}


def floating(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of all floating-point tensors in nested mappings and lists."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from floating(item, f"{name}.{key}" if name else str(key))
