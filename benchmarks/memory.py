"""Peak memory and time of a training step (forward and backward): whole, in parts, and with checkpointing."""

import argparse
from collections.abc import Sequence

import torch

from benchmarks.common.profiling import in_fresh_process, measured
from benchmarks.common.random_batch import random_batch
from configs.schema import Config, load_config
from model.build import build_task, resolve
from processor.gradient_cache import backward
from utils.batch import Batch
from utils.distributed import default_device, describe_device, peak_memory

CHECKPOINTING = ("model.image.checkpointing=true", "model.text.checkpointing=true")


def split(batch: Batch, parts: int) -> list[Batch]:
    """As the data loader gives a batch in parts."""
    if parts == 1:
        return [batch]
    fields = zip(*(value.chunk(parts) for value in batch.values()), strict=True)
    pieces = [dict(zip(batch, values, strict=True)) for values in fields]
    return [piece | {"shards": torch.tensor([len(piece["index"])])} for piece in pieces]


def step(config: Config, size: int) -> tuple[float, float, float]:
    """Seconds, peak MB (on a CPU: above what the model holds), and the loss."""
    torch.manual_seed(0)
    device = default_device()
    task = build_task(config, 10, pretrained=False).to(device).train()
    batch = random_batch(config, size, task.encoder.vocab_size)
    parts = split({name: batch[name] for name in ("images", "caption_ids", "pids", "index")}, config.train.accumulate)

    def run() -> float:
        total, _ = backward(task, parts, device=device, precision=config.train.precision, scale=lambda loss: loss)
        return float(total)

    if device.type == "cpu":
        return measured(run)
    run()  # warms up
    seconds, _, loss = measured(run)
    return seconds, 1024 * peak_memory(device), loss


def table(config_path: str, overrides: Sequence[str], size: int, parts: Sequence[int]) -> str:
    """A line for each way, with ratios to the whole batch."""
    ways = [(f"in {count} parts" if count > 1 else "whole", [f"train.accumulate={count}"]) for count in parts]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/baseline.yaml", help="default: configs/baseline.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override it")
    parser.add_argument("--batch", type=int, default=32, help="pairs in a step; default: 32")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    arguments = parser.parse_args()
    print(f"{describe_device(default_device())}, {arguments.config}, {arguments.batch} pairs")
    print(table(arguments.config, arguments.set, arguments.batch, arguments.parts))


if __name__ == "__main__":
    main()
