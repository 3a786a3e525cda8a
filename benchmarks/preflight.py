"""Peak memory that `train.py --preflight` predicts, beside that of real steps in a fresh process; Linux, CPU."""

import os
from dataclasses import dataclass

import torch

from benchmarks.common.authors import NUM_PIDS
from benchmarks.common.profiling import ONE_ARENA, in_fresh_process
from benchmarks.common.step_timing import CHECKPOINTING, cost_of_steps
from configs.arguments import Parser, positive
from configs.schema import Config, load_config
from processor.fake_step import FakeStep
from processor.random_batch import NUM_PAIRS
from processor.resolve import resolve
from utils.distributed import describe_device
from utils.exit import exit_on_user_error

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A config to measure."""

    config: str
    pairs: int
    overrides: tuple[str, ...] = ()

    def resolved(self) -> Config:
        return resolve(load_config(f"configs/{self.config}.yaml", self.overrides))


CASES = (
    Case("baseline", 16),
    Case("baseline", 8, ("train.precision=fp32",)),
    Case("irra", 16),
    Case("irra", 8, ("train.precision=fp32",)),
    Case("irra", 16, ("train.accumulate=4",)),
    Case("irra", 16, CHECKPOINTING),
    Case("fmfa", 8),
    Case("ivt", 4, ("model.mask_ratio=0",)),
    Case("rde", 16),
    Case("lcr2s", 8),
    Case("lcr2s", 16, ("teacher.cache=true",)),
    Case("lcr2s_teacher", 4),
    Case("lcr2s_joint", 16),
)


def predicted(case: Case) -> int:
    """Bytes at the peak of a step on fake tensors."""
    step = FakeStep(case.resolved(), NUM_PIDS, NUM_PAIRS, CPU)
    return sum(step.memory(step.batch(case.pairs)).values())


def row(case: Case, steps: int) -> str:
    """Line of the table for one config."""
    known = in_fresh_process(predicted, case)
    _, megabytes, _ = in_fresh_process(cost_of_steps, case.resolved(), case.pairs, steps)
    found = 2**20 * megabytes
    options = " ".join(("", *case.overrides)).replace(" ".join(CHECKPOINTING), "checkpointing")
    off = 100 * (known - found) / found
    return f"| {case.config}{options} | {case.pairs} | {known / 2**30:.2f} | {found / 2**30:.2f} | {off:+.1f} % |"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=positive, metavar="N", help="rows of the table; default: all")
    parser.add_argument("--steps", type=positive, default=1, help="real steps behind the first; default: 1")
    with exit_on_user_error():
        arguments = parser.parse_args()
        os.environ.update(ONE_ARENA)  # read by the processes to start
        print(f"{describe_device(CPU)}, torch {torch.__version__}, {arguments.steps + 1} steps")
        print("| config | pairs | predicted, GiB | measured, GiB | error |\n|---|---:|---:|---:|---:|")
        for number, case in enumerate(CASES, start=1):
            if not arguments.rows or number in arguments.rows:
                print(row(case, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
