"""Time and peak memory of EFA's forward and backward, in blocks and with all token similarities at once."""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common.profiling import in_fresh_process, measured
from configs.arguments import positive
from model.objectives import fine_grained
from utils.exit import exit_on_user_error

Matches = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def dense_matches(tokens: Tensor, joint: Tensor, valid: Tensor | None = None) -> Tensor:
    """Plain `best_matches`: all (B, B, K, L) similarities at once, and autograd."""
    scores = torch.einsum("ikd,jld->ijkl", tokens, joint)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    return scores.max(dim=3).values


def measure(matches: Matches, pairs: int, length: int, patches: int, dim: int) -> tuple[float, float, float]:
    """Seconds (the better of two runs), peak MB and value of EFA on random tokens, forward and backward."""
    torch.manual_seed(0)
    text = torch.randn(pairs, length, dim, requires_grad=True)
    image = torch.randn(pairs, patches, dim, requires_grad=True)

    def forward_and_backward() -> float:
        text.grad = image.grad = None
        loss = fine_grained.efa_loss(text, image, margin_text=0.1, margin_image=0.1, temperature=0.1)
        loss.backward()
        return loss.item()

    with mock.patch.object(fine_grained, "best_matches", matches):
        first, peak, value = measured(forward_and_backward)
        again, _, _ = measured(forward_and_backward)
    return min(first, again), peak, value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=positive, default=64)
    parser.add_argument("--length", type=positive, default=77)
    parser.add_argument("--patches", type=positive, default=192)
    parser.add_argument("--dim", type=positive, default=512)
    with exit_on_user_error():
        args = parser.parse_args()
        taken = []
        for matches in (fine_grained.best_matches, dense_matches):
            seconds, peak, value = in_fresh_process(measure, matches, args.pairs, args.length, args.patches, args.dim)
            taken.append((seconds, peak))
            print(f"{matches.__name__:13} {seconds:.2f} s  {peak:.0f} MB  efa {value:.5f}")
        (fast, small), (slow, large) = taken
        print(f"blocks / dense: time {fast / slow:.2f}, memory 1/{large / small:.1f}")
