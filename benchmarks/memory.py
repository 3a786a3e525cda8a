"""Peak memory and time of a training step (forward and backward), in micro-batches and with checkpointing."""

from collections.abc import Sequence

import torch

from benchmarks.common.profiling import in_fresh_process, measured
from configs.arguments import Parser, positive
from configs.schema import Config, load_config
from model.build import build_task
from processor.gradient_cache import backward
from processor.random_batch import micro_batches_of, random_batch, rows_per_pair
from processor.resolve import resolve
from utils.distributed import default_device, describe_device, peak_memory
from utils.errors import ConfigError
from utils.exit import exit_on_user_error

CHECKPOINTING = ("model.image.checkpointing=true", "model.text.checkpointing=true")


def step(config: Config, size: int) -> tuple[float, float, float]:
    """Seconds, peak MB (on a CPU: in addition to the model), and the loss of one step."""
    torch.manual_seed(0)
    device = default_device()
    task = build_task(config, 10, weights=False, teacher=False).to(device).train()
    batch = random_batch(config, size, task.encoder.vocab_size, task.inputs, device=device)
    micro_batches = micro_batches_of(batch, config.train.accumulate, rows_per_pair(config))

    def run() -> float:
        total, _ = backward(
            task, micro_batches, device=device, precision=config.train.precision, scale=lambda loss: loss
        )
        return float(total)

    if device.type == "cpu":
        return measured(run)
    run()  # warms up
    seconds, _, loss = measured(run)
    return seconds, 1024 * (peak_memory(device) or 0), loss


def table(config_path: str, overrides: Sequence[str], size: int, counts: Sequence[int]) -> str:
    """Markdown table with one line per number of micro-batches, and ratios to the first."""
    names = {count: "whole batch" if count == 1 else f"{count} micro-batches" for count in counts}
    ways = [(name, [f"train.accumulate={count}"]) for count, name in names.items()]
    ways += [(f"{name}, checkpointing", [*more, *CHECKPOINTING]) for name, more in (ways[0], ways[-1])]
    lines, first = ["| step | seconds | ratio | peak MB | ratio | loss |", "|---|---:|---:|---:|---:|---:|"], None
    for name, more in ways:
        config = resolve(load_config(config_path, [*overrides, *more]))
        seconds, peak, loss = in_fresh_process(step, config, size)
        first = first or (seconds, peak)
        ratios = seconds / first[0], peak / first[1]
        lines.append(f"| {name} | {seconds:.2f} | {ratios[0]:.2f} | {peak:.0f} | {ratios[1]:.2f} | {loss:.6f} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default="configs/baseline.yaml", help="default: configs/baseline.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override it")
    parser.add_argument("--batch", type=positive, default=32, help="pairs in a step; default: 32")
    parser.add_argument("--micro-batches", type=positive, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    with exit_on_user_error():
        arguments = parser.parse_args()
        if (most := max(arguments.micro_batches)) > arguments.batch:
            raise ConfigError(f"--micro-batches: must be at most --batch ({arguments.batch}), got {most}")
        print(f"{describe_device(default_device())}, {arguments.config}, {arguments.batch} pairs")
        print(table(arguments.config, arguments.set, arguments.batch, arguments.micro_batches))


if __name__ == "__main__":
    main()
