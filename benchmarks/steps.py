"""Training steps of methods in several precisions, beside the authors' code and the bare matrix products.

Whole steps (forward, losses, backward, update) on random data, warm and in turns. The authors' code comes from
checkouts: `--authors irra=PATH rde=PATH ivt=PATH` (benchmarks/common/authors.py names the repositories).

The floor of a step is the time of its floating-point operations at the rate of matrix products of its shapes,
measured in the same rounds.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.authors import AuthorsStep
from benchmarks.common.rounds import interleaved
from benchmarks.common.step_timing import step_of
from configs.arguments import Parser, positive
from configs.schema import load_config
from processor.random_batch import random_batch
from processor.resolve import resolve
from utils.distributed import default_device, describe_device
from utils.errors import ConfigError
from utils.exit import exit_on_user_error
from utils.precision import AUTOCAST

METHODS = ("configs/irra.yaml", "configs/fmfa.yaml", "configs/rde.yaml", "configs/ivt.yaml")
PRODUCT, REPEATS = (2048, 768, 3072), 20  # rows, inputs and outputs of a linear layer of ViT-B


def products(dtype: torch.dtype) -> Callable[[], object]:
    """A call that multiplies matrices of the shapes of a step."""
    rows, inputs, outputs = PRODUCT
    one = torch.randn(rows, inputs, dtype=dtype, device=default_device())
    other = torch.randn(inputs, outputs, dtype=dtype, device=default_device())

    def run() -> float:
        for _ in range(REPEATS):
            result = one @ other
        return float(result[0, 0])

    return run


def table(path: str, ways: list[list[str]], pairs: int, rounds: int, authors: str | None) -> str:
    """Markdown table of a config's steps.

    Args:
        path: config file.
        ways: overrides of each row.
        pairs: pairs in a step.
        rounds: timed steps of each way.
        authors: folder of the authors' code.
    """
    configs = {" ".join(overrides) or "as shipped": resolve(load_config(path, overrides)) for overrides in ways}
    config = next(iter(configs.values()))
    steps = {name: step_of(one) for name, one in configs.items()}
    first = next(iter(steps.values()))
    torch.manual_seed(0)
    batch = random_batch(
        config, pairs, first.task.encoder.vocab_size, first.task.inputs | {"caption_ids"}, device=default_device()
    )
    calls: dict[str, Callable[[], object]] = {name: partial(step, batch) for name, step in steps.items()}
    if authors is not None:
        calls = {"authors": partial(AuthorsStep(Path(path).stem, authors, config), batch), **calls}
    with FlopCounterMode(display=False) as counter:
        first(batch)
    operations = counter.get_total_flops()
    dtypes = {name: AUTOCAST.get(one.train.precision, torch.float32) for name, one in configs.items()}
    floors = {f"products in {dtype}": products(dtype) for dtype in dict.fromkeys(dtypes.values())}
    measured = interleaved(calls | floors, rounds)
    scale = operations / (2 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2] * REPEATS)
    lines = [
        f"{path}, {pairs} pairs, {operations / 1e12:.2f} TFLOP",
        "",
        "| step | seconds | range | authors / step | floor / step |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in calls:
        speedup = "" if authors is None else f"{1 / measured.ratio(name, 'authors'):.2f}"
        floor = f"{scale / measured.ratio(name, f'products in {dtypes[name]}'):.2f}" if name in dtypes else ""
        lines.append(f"| {name} | {measured.cells(name)} | {speedup} | {floor} |")
    return "\n".join([*lines, "", measured.note])


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="in all rows")
    parser.add_argument("--batch", type=positive, default=8, help="pairs in a step; default: 8")
    parser.add_argument("--rounds", type=positive, default=3, help="timed steps of each row; default: 3")
    parser.add_argument("--authors", nargs="+", default=[], metavar="METHOD=FOLDER", help="code of the authors")
    with exit_on_user_error():
        arguments = parser.parse_args()
        if wrong := [one for one in arguments.authors if "=" not in one]:
            raise ConfigError(f"--authors: must be METHOD=FOLDER, got {wrong[0]}")
        authors = dict(one.split("=", 1) for one in arguments.authors)
        print(describe_device(default_device()))
        ways = [[f"train.precision={precision}", *arguments.set] for precision in arguments.precisions]
        for path in arguments.configs:
            folder = authors.get(Path(path).stem)
            print(f"\n{table(path, ways, arguments.batch, arguments.rounds, folder)}", flush=True)


if __name__ == "__main__":
    main()
