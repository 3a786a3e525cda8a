"""Scalar arithmetic for losses restated as explicit loops."""

import math


def softmax(row: list[float]) -> list[float]:
    """Softmax of a row."""
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def dot(a: list[float], b: list[float]) -> float:
    """Dot product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    """Cosine similarity."""
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def divergence(logits: list[float], target: list[float], eps: float) -> float:
    """KL divergence of softmax(logits) from a target, with eps added to the target."""
    return sum(p * (math.log(p) - math.log(q + eps)) for p, q in zip(softmax(logits), target, strict=True))
