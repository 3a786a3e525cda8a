"""Interleaved rounds of several ways to do one thing, with a probe of the machine around each round."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

PROBE, TOLERANCE = 1024, 0.15  # side of the probe's matrices; spread of its times on an undisturbed machine


class Rounds(NamedTuple):
    """Seconds of each way by round, and seconds of the probe before, between and after the rounds."""

    seconds: Mapping[str, list[float]]
    probe: list[float]

    def cells(self, way: str) -> str:
        """Median and range of a way, as table cells."""
        times = self.seconds[way]
        return f"{statistics.median(times):.3f} | {min(times):.3f} to {max(times):.3f}"

    def ratio(self, way: str, floor: str) -> float:
        """Median over rounds of a way's time in units of the floor's time in the same round."""
        return statistics.median(one / other for one, other in zip(self.seconds[way], self.seconds[floor], strict=True))

    @property
    def note(self) -> str:
        """Remark on the machine, for the line below a table."""
        spread = max(self.probe) / min(self.probe) - 1
        state = "undisturbed" if spread <= TOLERANCE else "DISTURBED: measure again"
        return f"machine: a fixed product varied by {100 * spread:.0f} % ({state})"


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> Rounds:
    """Time the ways in turns, so that other load affects all of them. A first, untimed round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    probes = [probe()]
    for _ in range(rounds):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
        probes.append(probe())
    return Rounds(seconds, probes)


def probe(repeats: int = 5) -> float:
    """Seconds of a fixed matrix product, the best of a few: a busy machine takes longer."""
    side = torch.ones(PROBE, PROBE)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        side @ side
        times.append(time.perf_counter() - start)
    return min(times)
