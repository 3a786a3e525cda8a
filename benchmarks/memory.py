"""Peak memory and time of whole training steps, in micro-batches and with checkpointing.

Each row is a process of its own. Its peak includes weights, gradients, optimizer state and activations; on a CPU, it
is the resident memory above the level before the model.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.profiling import ONE_ARENA, in_fresh_process
from benchmarks.common.step_timing import CHECKPOINTING, cost_of_steps
from configs.arguments import Parser, positive
from configs.schema import load_config
from processor.resolve import resolve
from utils.distributed import default_device, describe_device
from utils.errors import ConfigError
from utils.exit import exit_on_user_error


def table(
    config_path: str, overrides: Sequence[str], size: int, counts: Sequence[int], steps: int, authors: str | None = None
) -> str:
    """Markdown table with one line per number of micro-batches, and ratios to the first line.

    Args:
        config_path: config file.
        overrides: overrides of all rows.
        size: pairs in a step.
        counts: numbers of micro-batches.
        steps: timed steps of each row.
        authors: folder of the authors' code for a first line.
    """
    names = {count: "whole batch" if count == 1 else f"{count} micro-batches" for count in counts}
    ways = [(name, [f"train.accumulate={count}"]) for count, name in names.items()]
    ways += [(f"{name}, checkpointing", [*more, *CHECKPOINTING]) for name, more in ways[:1] + ways[1:][-1:]]
    lines, first = ["| step | seconds | ratio | peak MB | ratio | loss |", "|---|---:|---:|---:|---:|---:|"], None
    theirs = None if authors is None else (Path(config_path).stem, authors)
    for name, more in ([("authors", [])] if theirs else []) + ways:
        config = resolve(load_config(config_path, [*overrides, *more]))
        arguments = (config, size, steps, theirs) if name == "authors" else (config, size, steps)
        seconds, peak, loss = in_fresh_process(cost_of_steps, *arguments)
        first = first or (seconds, peak)
        ratios = seconds / first[0], peak / first[1]
        lines.append(f"| {name} | {seconds:.2f} | {ratios[0]:.2f} | {peak:.0f} | {ratios[1]:.2f} | {loss:.6f} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/baseline.yaml", help="default: configs/baseline.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override it")
    parser.add_argument("--batch", type=positive, default=32, help="pairs in a step; default: 32")
    parser.add_argument("--micro-batches", type=positive, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--steps", type=positive, default=3, help="timed steps of each row; default: 3")
    parser.add_argument("--authors", metavar="FOLDER", help="code of the authors, see benchmarks/common/authors.py")
    with exit_on_user_error():
        arguments = parser.parse_args()
        if (most := max(arguments.micro_batches)) > arguments.batch:
            raise ConfigError(f"--micro-batches: must be at most --batch ({arguments.batch}), got {most}")
        print(f"{describe_device(default_device())}, {arguments.config}, {arguments.batch} pairs")
        os.environ.update(ONE_ARENA)  # read by the processes to start
        counts, steps = arguments.micro_batches, arguments.steps
        print(table(arguments.config, arguments.set, arguments.batch, counts, steps, arguments.authors))


if __name__ == "__main__":
    main()
