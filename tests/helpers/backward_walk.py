"""Backward pass in Python, for tensors on a simulated GPU: autograd's engine asks the driver for a context."""

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

passes = 0  # number of backward passes so far
Edge = tuple[Any, int]  # a node of the graph, and the number of its input


def backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Accumulate gradients in the order of autograd's engine: the latest operation first.

    Args:
        tensors: results to differentiate.
        gradients: gradients of the results.
    """
    global passes
    passes += 1
    roots = [_edge(tensor) for tensor in tensors]
    waiting, buffers = _dependencies([node for node, _ in roots]), dict[Any, dict[int, Tensor]]()
    for edge, gradient in zip(roots, gradients, strict=True):
        _add(buffers, edge, gradient)
    ties, ready = count(), list[tuple[int, int, Any]]()
    for node in dict.fromkeys(node for node, _ in roots):
        if not waiting[node]:
            heapq.heappush(ready, (-node._sequence_nr(), next(ties), node))
    while ready:
        *_, node = heapq.heappop(ready)
        with torch.no_grad():
            results = _run(node, buffers.pop(node, {}))
        for (target, number), gradient in zip(node.next_functions, results, strict=True):
            if target is None:
                continue
            if gradient is not None:
                _add(buffers, (target, number), gradient)
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, (-target._sequence_nr(), next(ties), target))


def _edge(tensor: Tensor) -> Edge:
    return (tensor.grad_fn, tensor.output_nr) if tensor.grad_fn is not None else (tensor.view_as(tensor).grad_fn, 0)


def _dependencies(roots: Sequence[Any]) -> Counter[Any]:
    """Number of edges into each node that is reached from the roots."""
    waiting, seen, stack = Counter[Any](), set(roots), list(set(roots))
    while stack:
        for target, _ in stack.pop().next_functions:
            if target is not None:
                waiting[target] += 1
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
    return waiting


def _add(buffers: dict[Any, dict[int, Tensor]], edge: Edge, gradient: Tensor) -> None:
    """Add a gradient to the input of a node, in the shape and type of the value that it belongs to."""
    node, number = edge
    metadata = _metadata(node)[number]
    assert gradient.device == metadata.device, f"{node.name()}: gradient on {gradient.device}, value on the GPU"
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    gradient = gradient.to(metadata.dtype)
    buffer = buffers.setdefault(node, {})
    buffer[number] = buffer[number] + gradient if number in buffer else gradient


def _run(node: Any, inputs: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Gradients for the `next_functions` of a node."""
    metadata = _metadata(node)
    gradients = [inputs.get(number) for number in range(len(metadata))]
    if not isinstance(node, BackwardCFunction):
        results = node(*gradients)
        return results if isinstance(results, tuple) else (results,) * bool(node.next_functions)
    for number, one in enumerate(metadata):
        if gradients[number] is None:
            gradients[number] = torch.zeros(one.shape, dtype=one.dtype, device=one.device)
    results = node.apply(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    needed = iter(gradient for gradient, need in zip(results, node.needs_input_grad, strict=True) if need)
    return [None if target is None else next(needed) for target, _ in node.next_functions]


def _metadata(node: Any) -> Sequence[Any]:
    found = node._input_metadata
    return found if isinstance(found, list | tuple) else (found,)
