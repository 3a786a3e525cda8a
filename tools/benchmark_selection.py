"""Time of a training step with RDE's token selection beside one without, and beside attention weights of all blocks."""

import argparse

from configs.schema import Config, load_config
from model.encoders.clip import CLIPEncoder
from model.task import RetrievalTask, build_task
from tools.benchmark_distillation import random_batch
from tools.steps import compare_steps
from utils.distributed import default_device, describe_device

WAYS = ("clip", "token selection", "token selection, weights of all blocks")


def build(way: str, config: Config) -> RetrievalTask:
    """RDE with random weights, RDE without its second embedding, or RDE where every block makes its weights."""
    model = dict(config.model)
    if way == WAYS[0]:
        model = {name: model[name] for name in ("embed_dim", "temperature", "image", "text")} | {"name": "clip"}
    losses = {name: {**options, "consensus": None} for name, options in config.losses.items()}
    task = build_task(Config(data=config.data, model=model, losses=losses), 10, pretrained=False)
    if way == WAYS[2]:
        assert isinstance(task.encoder, CLIPEncoder)
        for block in task.encoder.image.trunk.blocks:
            block.attn.fused_attn = False
        task.encoder.text.trunk.config._attn_implementation = "eager"
    return task.to(default_device())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/rde.yaml", help="default: configs/rde.yaml")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step; default: 8")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each way, taken in turns; default: 5")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    tasks = {way: build(way, config).train() for way in WAYS}
    batch = random_batch(config, arguments.batch, tasks[WAYS[0]].encoder.vocab_size)
    print(f"{describe_device(default_device())}, {arguments.batch} pairs, {arguments.steps} steps each, fp32")
    print(compare_steps(tasks, batch, arguments.steps))


if __name__ == "__main__":
    main()
