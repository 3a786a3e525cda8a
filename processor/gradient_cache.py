"""Loss and gradients of a batch, at once or in micro-batches with the same gradients and less memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from model.objectives import MaskedMean, Metrics
from model.task import EMBEDDINGS, RetrievalTask
from processor.passes import Passes, ReplicatedPasses
from utils.batch import Batch, MicroBatch
from utils.precision import autocast
from utils.seed import random_state, set_random_state
from utils.sharding import Shard


def backward(
    task: RetrievalTask,
    micro_batches: Sequence[MicroBatch],
    *,
    device: torch.device,
    precision: str,
    scale: Callable[[Tensor], Tensor],
    passes: Passes | ReplicatedPasses | None = None,
) -> tuple[Tensor, Metrics]:
    """Add the gradients of a batch to those of the parameters; returns loss and metrics as `RetrievalTask.forward`.

    Several micro-batches are trained on as in GradCache (Gao et al., RepL4NLP 2021, https://arxiv.org/abs/2101.06983).
    The towers first encode each of them without keeping activations. The losses on all embeddings give the gradients
    of the embeddings. The towers then encode each micro-batch again to backpropagate these. Losses on embeddings see
    the global batch this way, and losses on tokens see one micro-batch at a time.

    Args:
        task: the task to train, on `device`.
        micro_batches: the batch, on `device`.
        device: device of the step.
        precision: autocast precision, fp32, bf16 or fp16.
        scale: loss scaling, against underflow of fp16 gradients.
        passes: forward passes of the task on several processes; None trains in one.
    """
    passes = passes or Passes(task)
    if len(micro_batches) == 1:
        with autocast(device, precision):
            total, metrics = passes(task, *micro_batches[0])
        scale(total).backward()
        return total.detach(), metrics

    shards = [shard for _, shard in micro_batches]
    encoded, states = [], []
    for fields, _ in micro_batches:
        states.append(random_state(device))
        with torch.no_grad(), autocast(device, precision):
            encoded.append(passes(task.encode, fields)[0])
    rows = {
        name: torch.cat([shard.local(part[name]) for part, shard in zip(encoded, shards, strict=True)])
        for name in encoded[0]
    }
    leaves = {name: value.requires_grad_() for name, value in rows.items() if name.startswith(EMBEDDINGS)}
    with autocast(device, precision):
        total, metrics = passes(_embedding_losses, task, Shard.union(shards).gather(rows), sync=False)
    if total.requires_grad:
        scale(total).backward()

    total, weights = total.detach(), task.token_weights(micro_batches)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    sizes = [shard.num_local_rows for shard in shards]
    for number, (fields, shard) in enumerate(micro_batches):
        set_random_state(states[number], device)  # the same dropout and masks as in the first pass
        last = number == len(micro_batches) - 1
        with autocast(device, precision):
            part, loss, found = passes(_token_losses, task, fields, weights[number], gradients, sync=last)
        _backpropagate(
            {name: shard.local(embedding) for name, embedding in part.items()},
            {name: gradient.split(sizes)[number] for name, gradient in gradients.items()},
            scale(loss),
        )
        total += loss.detach()
        for name, value in found.items():
            metrics[name] = _add(metrics[name], value) if name in metrics else value
    return total, metrics


def _embedding_losses(task: RetrievalTask, rows: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
    return task.losses(task.step(rows), tokens=False)


def _token_losses(
    task: RetrievalTask, fields: Batch, weights: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, Tensor], Tensor, Metrics]:
    """Embeddings of a micro-batch by name, and its losses on tokens."""
    rows, tokens = task.encode(fields)
    loss, metrics = task.losses(task.step(rows, fields, tokens), tokens=True, weights=weights)
    return {name: rows[name].clone() for name in names}, loss, metrics  # hooks of FSDP warn of views


def _add(one: Tensor | MaskedMean, other: Tensor | MaskedMean) -> Tensor | MaskedMean:
    """Add the logged values of two micro-batches: weighted or masked means."""
    if isinstance(one, MaskedMean) and isinstance(other, MaskedMean):
        return MaskedMean(one.total + other.total, one.number + other.number)
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    return one + other


def _backpropagate(embeddings: Mapping[str, Tensor], gradients: Mapping[str, Tensor], loss: Tensor) -> None:
    """Backpropagate the gradients of the embeddings, and the losses on tokens, through the towers."""
    names = [name for name in gradients if embeddings[name].requires_grad]
    tensors, grads = [embeddings[name] for name in names], [gradients[name] for name in names]
    if loss.requires_grad:
        tensors.append(loss)
        grads.append(torch.ones_like(loss))
    torch.autograd.backward(tensors, grads)
