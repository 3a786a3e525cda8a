"""Time of a training step with RDE's token selection, without it, and with attention weights of all blocks."""

from benchmarks.common.step_timing import steps_program
from configs.schema import Config
from model.build import build_task
from model.encoders.clip import CLIPEncoder
from model.task import RetrievalTask
from utils.distributed import default_device
from utils.errors import ConfigError

WAYS = ("clip", "token selection", "token selection, weights of all blocks")


def build(way: str, config: Config) -> RetrievalTask:
    """RDE with random weights, without its second embedding, or with attention weights in every block."""
    model = dict(config.model)
    if model["name"] != "token_selection":
        raise ConfigError(f"--config: needs model.name=token_selection, as configs/rde.yaml has, got {model['name']}")
    if way == WAYS[0]:
        model = {name: model[name] for name in ("embed_dim", "temperature", "image", "text")} | {"name": "clip"}
    losses = {name: {**options, "consensus": None} for name, options in config.losses.items()}
    task = build_task(Config(data=config.data, model=model, losses=losses), 10, weights=False, teacher=False)
    if way == WAYS[2]:
        assert isinstance(task.encoder, CLIPEncoder)
        for block in task.encoder.image.trunk.blocks:
            block.attn.fused_attn = False
        task.encoder.text.trunk.config._attn_implementation = "eager"
    return task.to(default_device())


if __name__ == "__main__":
    steps_program(__doc__, "configs/rde.yaml", WAYS, build)
