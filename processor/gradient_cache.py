"""Loss and gradients of a batch, whole or in parts that need less memory and give the same numbers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.global_batch import Read, join, own_rows
from model.objectives import PartMean, Values
from model.task import RetrievalTask
from utils.batch import Batch
from utils.precision import autocast
from utils.seed import random_state, set_random_state


def backward(
    task: RetrievalTask,
    parts: Sequence[Batch],
    *,
    device: torch.device,
    precision: str,
    scale: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Values]:
    """Add the gradients of a batch to those of the parameters; returns what `RetrievalTask.forward` does, detached.

    Several parts: the towers encode one after the other without keeping what a gradient needs, the losses give the
    gradient of the embeddings, and the towers encode each part again to pass it on (GradCache: Gao et al., RepL4NLP
    2021). Objectives on embeddings so see the whole batch; those on tokens see a part at a time.

    Args:
        parts: on `device`.
        scale: of the gradients, against underflow.
    """
    if len(parts) == 1:
        with autocast(device, precision):
            total, terms = task(parts[0])
        scale(total).backward()
        return total.detach(), terms

    reads, states = [], []
    for part in parts:
        states.append(random_state(device))
        with torch.no_grad(), autocast(device, precision):
            reads.append(task.read(part))
    whole, batch = join(reads, parts)
    del reads
    with autocast(device, precision):
        total, terms = task.losses(task.step(whole, batch), tokens=False)
    if total.requires_grad:
        scale(total).backward()
    total, gradients = total.detach(), _split([leaf.grad for leaf in whole.embeddings], parts)
    shares = task.shares(parts)
    for part, state, gradient, share in zip(parts, states, gradients, shares, strict=True):
        set_random_state(state, device)  # the same dropout and masks as before
        alone = {name: value for name, value in part.items() if name != "shards"}
        with autocast(device, precision):
            read = task.read(part)
            loss, values = task.losses(task.step(read, alone), tokens=True, shares=share)
        _pass_on(read, gradient, scale(loss))
        total += loss.detach()
        for name, value in values.items():
            before = terms.get(name)
            terms[name] = value if before is None else _sum(before, value)
    return total, terms


def _sum(one: Tensor | PartMean, other: Tensor | PartMean) -> Tensor | PartMean:
    """Of two parts' values: weighted already, or a sum and a number."""
    if isinstance(one, PartMean) and isinstance(other, PartMean):
        return PartMean(one.total + other.total, one.number + other.number)
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    return one + other


def _split(gradients: Sequence[Tensor | None], parts: Sequence[Batch]) -> list[list[Tensor | None]]:
    """Of the embeddings of the whole batch -> for each part, of its embeddings."""
    rows = [own_rows(part) for part in parts]
    split = [
        [None] * len(parts) if gradient is None else list(gradient[: sum(rows)].split(rows)) for gradient in gradients
    ]
    return [list(part) for part in zip(*split, strict=True)]


def _pass_on(read: Read, gradients: Sequence[Tensor | None], loss: Tensor) -> None:
    tensors, found = [], []
    for embedding, gradient in zip(read.embeddings, gradients, strict=True):
        if embedding.requires_grad and gradient is not None:
            padded = embedding.new_zeros(embedding.shape)  # a stand-in has no gradient
            padded[: len(gradient)] = gradient
            tensors.append(embedding)
            found.append(padded)
    if loss.requires_grad:
        tensors.append(loss)
        found.append(torch.ones_like(loss))
    torch.autograd.backward(tensors, found)
