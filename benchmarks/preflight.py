"""Peak memory that `train.py --preflight` predicts, beside that of real steps in a fresh process; Linux, CPU."""

import os
from dataclasses import dataclass

import torch

from benchmarks.common.profiling import in_fresh_process, memory_mb
from configs.arguments import Parser, positive
from configs.schema import Config, load_config
from model.build import as_configured, build_task, distils, random_teacher
from model.task import RetrievalTask
from model.teacher import CachedTeacher
from processor.fake_step import FakeStep
from processor.gradient_cache import backward
from processor.random_batch import NUM_PAIRS, micro_batches_of, random_batch, rows_per_pair
from processor.resolve import resolve
from solver.optimizer import build_optimizer, set_lr
from utils.distributed import describe_device
from utils.exit import exit_on_user_error

NUM_PIDS = 11_003  # training identities of CUHK-PEDES
CPU = torch.device("cpu")
CHECKPOINTING = ("model.image.checkpointing=true", "model.text.checkpointing=true")
# One arena that returns large blocks at once, so that the peak is that of the tensors and not of glibc's caches.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


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


def measured(case: Case, steps: int) -> int:
    """Bytes at the peak of a process that trains, in addition to what it holds before the model is built."""
    config = case.resolved()
    before = memory_mb("VmRSS")
    torch.manual_seed(0)
    task = build_task(config, NUM_PIDS, weights=False, teacher=False).train()
    teacher = as_configured(random_teacher(config), config) if distils(config) else None
    if isinstance(teacher, CachedTeacher):
        teacher.fill(*(torch.randn(NUM_PAIRS, task.encoder.embed_dim) for _ in range(2)))
    task = RetrievalTask(task.encoder, dict(task.named_objectives()), teacher)
    optimizer = build_optimizer(config.solver, task.named_parameters())
    set_lr(optimizer, lambda rate: rate)
    batch = random_batch(config, case.pairs, task.encoder.vocab_size, task.inputs)
    micro_batches = micro_batches_of(batch, config.train.accumulate, rows_per_pair(config))
    for _ in range(steps):
        backward(task, micro_batches, device=CPU, precision=config.train.precision, scale=lambda loss: loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return int((memory_mb("VmHWM") - before) * 2**20)


def row(case: Case, steps: int) -> str:
    """Line of the table for one config."""
    known, found = in_fresh_process(predicted, case), in_fresh_process(measured, case, steps)
    options = " ".join(("", *case.overrides)).replace(" ".join(CHECKPOINTING), "checkpointing")
    off = 100 * (known - found) / found
    return f"| {case.config}{options} | {case.pairs} | {known / 2**30:.2f} | {found / 2**30:.2f} | {off:+.1f} % |"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=positive, metavar="N", help="rows of the table; default: all")
    parser.add_argument("--steps", type=positive, default=2, help="real steps; default: 2")
    with exit_on_user_error():
        arguments = parser.parse_args()
        os.environ.update(MALLOC)  # read by the processes to start
        print(f"{describe_device(CPU)}, torch {torch.__version__}, {arguments.steps} steps")
        print("| config | pairs | predicted, GiB | measured, GiB | error |\n|---|---:|---:|---:|---:|")
        for number, case in enumerate(CASES, start=1):
            if not arguments.rows or number in arguments.rows:
                print(row(case, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
