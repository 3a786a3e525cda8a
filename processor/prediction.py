"""Predicted cost of a run's own steps, beside what was measured."""

import torch

from configs.schema import Config
from datasets.pairs import TrainPairs
from processor.fake_step import Cost, FakeStep
from processor.timing import Timing
from utils.batch import MicroBatch
from utils.distributed import peak_memory, rank
from utils.errors import first_line
from utils.logger import LOGGER

AFTER = 10  # steps


class Prediction:
    """Predicts a step from the largest of the first batches, when these have been trained on.

    Args:
        config: resolved config of the run; `train.preflight` switches the prediction on or off.
        device: device of the steps.
        timing: times of the run, which learn the number of operations.
    """

    def __init__(self, config: Config, device: torch.device, timing: Timing) -> None:
        asked = config.train.preflight
        self.config, self.device, self.timing = config, device, timing
        self.on = rank() == 0 and (device.type != "cpu" if asked is None else asked)
        self._steps, self._size = 0, 0
        self._largest: list[MicroBatch] = []

    def note(self, micro_batches: list[MicroBatch], pairs: TrainPairs) -> None:
        """Add a step; logs the prediction once, after some steps.

        Args:
            micro_batches: batch of the step.
            pairs: training pairs.
        """
        if not self.on:
            return
        size = sum(value.numel() for fields, _ in micro_batches for value in fields.values())
        if size > self._size:
            self._largest, self._size = micro_batches, size
        self._steps += 1
        if self._steps < AFTER:
            return
        self.on, batch, self._largest = False, self._largest, []
        try:
            step = FakeStep(self.config, len(pairs.labels), len(pairs), self.device)
            cost = step.cost(step.like([micro_batch.to(torch.device("cpu")) for micro_batch in batch]))
        except Exception as error:  # a kernel without a rule for shapes, in any library; training continues
            LOGGER.warning("train.preflight: a step cannot be predicted (%s)", first_line(error))
            return
        self.timing.flops = cost.flops
        self._log(cost)

    def _log(self, cost: Cost) -> None:
        measured = peak_memory(self.device)
        kind = "resident, libraries included" if self.device.type == "cpu" else "allocated"
        found = "" if measured is None else f", measured {measured:.2f} GiB ({kind})"
        LOGGER.info(
            "after %d steps: a step is %.3g TFLOP; peak memory: predicted %.2f GiB%s",
            *(AFTER, cost.flops / 1e12, cost.peak / 2**30, found),
        )
