"""Check of the training state in a checkpoint, before any of it is used, against the run that resumes from it.

A hand-made state must not end in a crash: fused optimizers and generators read past tensors that are too small.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from processor.reporting import EMA
from processor.trainer import Trainer
from utils.metrics import METRICS
from utils.seed import random_state

MOST = 2**53  # largest count; beyond it, floats skip integers
SPLITS = {split + suffix for split in ("val", "test") for suffix in ("", EMA)}


def check_training_state(content: Mapping[str, Any], trainer: Trainer) -> None:
    """Raise `ValueError` or `KeyError` for a training state that does not fit the run; the message names the entry.

    Args:
        content: content of `last.pt`, of any kind.
        trainer: trainer that is to load it.
    """
    for name, value in mapping(content["model"], "model").items():
        require(isinstance(value, Tensor), f"model.{name}: must be a tensor, got {shown(value)}")
    state = mapping(content["training"], "training")
    epoch, batches, step = (count(state[name], name) for name in ("epoch", "batches", "step"))
    history = sequence(state["history"], "history")
    require(epoch > 0 and len(history) == epoch - 1, f"history: must have {epoch - 1} epochs, got {len(history)}")
    for number, record in enumerate(history, start=1):
        check_record(record, f"history[{number - 1}]", number)
    trainer.train.batches.set_epoch(epoch)
    most = len(trainer.train)
    require(batches <= most, f"batches: must be at most {most}, the batches of epoch {epoch}, got {batches}")
    require(batches <= step, f"step: must be at least {batches}, got {step}")
    trained = state.get("trained", False)
    fits(trained, True, "trained")
    if batches or trained:
        check_record(state["record"], "record", epoch)
    fits(state["unreadable"], trainer.train.pairs.images.bad, "unreadable")
    check_optimizer(mapping(state["optimizer"], "optimizer"), trainer.engine.optimizer)
    scaler = trainer.engine.scaler.state_dict()
    fits(state["scaler"], scaler, "scaler") if scaler else mapping(state["scaler"], "scaler")
    check_objectives(state, trainer)
    if trainer.engine.average is not None and state["average"] is not None:
        fits(state["average"], trainer.engine.average.state_dict(), "average")
    processes = sequence(state["processes"], "processes")
    require(len(processes) > 0, "processes: must have at least one entry")
    for number, local in enumerate(processes):
        check_process(mapping(local, f"processes[{number}]"), trainer.device, f"processes[{number}]")


def check_record(record: Any, path: str, epoch: int) -> None:
    """Check a line of metrics.jsonl: numbers, and metrics for each split."""
    for name, value in mapping(record, path).items():
        if name in SPLITS:
            values = mapping(value, f"{path}.{name}")
            require(values.keys() >= set(METRICS), f"{path}.{name}: must have {', '.join(METRICS)}")
        else:
            values = {name: value}
        for key, number in values.items():
            require(is_number(number), f"{path}.{name}: must be a number, got {shown(number)} for {key}")
    require(record.get("epoch") == epoch, f"{path}.epoch: must be {epoch}, got {shown(record.get('epoch'))}")


def check_optimizer(state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Check the tensors of every parameter against those that a step would make."""
    groups = optimizer.state_dict()["param_groups"]
    saved = [mapping(group, "optimizer.param_groups") for group in sequence(state["param_groups"], "param_groups")]
    fits([group["params"] for group in saved], [group["params"] for group in groups], "optimizer.param_groups")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = state_of_step(optimizer)
    for number, tensors in mapping(state["state"], "optimizer.state").items():
        path = f"optimizer.state[{number!r}]"
        require(type(number) is int and 0 <= number < len(parameters), f"{path}: there is no such parameter")
        parameter = parameters[number]
        like = {name: parameter if value is None else value for name, value in expected.items()}
        fits(tensors, like, path)
        for name in (name for name, value in expected.items() if value is not None):
            require(bool(tensors[name] >= 0), f"{path}.{name}: must be at least 0, got {float(tensors[name])}")


def state_of_step(optimizer: Optimizer) -> dict[str, Tensor | None]:
    """State of a parameter after its first step; None for a tensor like the parameter."""
    probe = Parameter(torch.zeros(1, 1))
    probe.grad = torch.zeros(1, 1)
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    one = type(optimizer)([probe], **options)
    one.step()
    return {name: None if value.shape == probe.shape else value for name, value in one.state[probe].items()}


def check_objectives(state: Mapping[str, Any], trainer: Trainer) -> None:
    """Check the tensors of the objectives. Those of booleans are masks of the training pairs."""
    states = mapping(state["objectives"] if "objectives" in state else state["counted"], "objectives")
    pairs = torch.zeros(len(trainer.train.pairs), dtype=torch.bool)
    for name, values in states.items():
        for key, value in mapping(values if "objectives" in state else {name: values}, f"objectives.{name}").items():
            if value is None and "objectives" not in state:
                continue
            path = f"objectives.{name}.{key}"
            require(isinstance(value, Tensor), f"{path}: must be a tensor, got {shown(value)}")
            fits(value, pairs if value.dtype == torch.bool else value, path)


def check_process(state: Mapping[str, Any], device: torch.device, path: str) -> None:
    """Check the running means and the generators of a process."""
    meters = mapping(state["meters"], f"{path}.meters")
    sums, counts = (mapping(meters[name], f"{path}.meters.{name}") for name in ("sums", "counts"))
    require(sums.keys() == counts.keys(), f"{path}.meters: sums and counts must have the same names")
    for name, value in sums.items():
        scalar = isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point() and not value.is_meta
        require(
            scalar, f"{path}.meters.sums.{name}: must be a scalar, got {shown(value)}"
        )  # perhaps NaN, with weight 0
    for name, value in counts.items():
        number = value.item() if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta else value
        count(number, f"{path}.meters.counts.{name}")
    generators = mapping(state["random"], f"{path}.random")
    for name, like in random_state(device).items():
        if name == "cpu" or name in generators:
            fits(generators[name], like, f"{path}.random.{name}")


def fits(value: Any, like: Any, path: str) -> None:
    """Require the structure of `like`: types, names, lengths, shapes and kinds of numbers; finite and countable values.

    Args:
        value: anything.
        like: tensors, numbers, texts and None in mappings and lists.
        path: dotted path of the value.
    """
    if isinstance(like, Tensor):
        same = isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)
        same = same and value.dtype == like.dtype and value.shape == like.shape
        require(same, f"{path}: must be a {shown(like)}, got {shown(value)}")
        require(not value.is_floating_point() or bool(value.isfinite().all()), f"{path}: must be finite")
        counted = like.dim() == 0 and like.dtype == torch.int64
        require(not counted or value.item() >= 0, f"{path}: must be at least 0, got {value}")
    elif isinstance(like, Mapping):
        require(mapping(value, path).keys() == like.keys(), f"{path}: must have {names(like)}, got {names(value)}")
        for name, entry in like.items():
            fits(value[name], entry, f"{path}.{name}")
    elif isinstance(like, Sequence) and not isinstance(like, str):
        require(len(sequence(value, path)) == len(like), f"{path}: must have {len(like)} entries, got {len(value)}")
        for number, entry in enumerate(like):
            fits(value[number], entry, f"{path}[{number}]")
    elif type(like) is int:
        count(value, path)
    elif type(like) is float:
        require(is_number(value) and math.isfinite(value) and value > 0, f"{path}: must be above 0, got {shown(value)}")
    else:
        require(type(value) is type(like), f"{path}: must be a {type(like).__name__}, got {shown(value)}")


def require(fine: bool, problem: str) -> None:
    if not fine:
        raise ValueError(problem)


def count(value: Any, path: str) -> int:
    require(type(value) is int and 0 <= value < MOST, f"{path}: must be a count, got {shown(value)}")
    return int(value)


def mapping(value: Any, path: str) -> Mapping[Any, Any]:
    require(isinstance(value, Mapping), f"{path}: must be a mapping, got {shown(value)}")
    fine: Mapping[Any, Any] = value
    return fine


def sequence(value: Any, path: str) -> Sequence[Any]:
    require(isinstance(value, list | tuple), f"{path}: must be a list, got {shown(value)}")
    fine: Sequence[Any] = value
    return fine


def is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < MOST)


def names(value: Mapping[Any, Any], most: int = 5) -> str:
    return (
        ", ".join(str(name)[:40] for name in list(value)[:most]) + (", ..." if len(value) > most else "") or "nothing"
    )


def shown(value: Any) -> str:
    """The value for a message, cut short; the shape and type of a tensor."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if type(value) is int and abs(value) >= MOST:  # Python refuses to print very long ones
        return "a number with more than 15 digits"
    return repr(value)[:80] if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
