"""Builders from config: encoder, teacher, and a task ready to train or evaluate."""

import dataclasses
from collections.abc import Callable
from typing import Any

from configs.schema import Config, InitConfig, load_config, parse_config
from model.checkpoints.files import weights_file
from model.encoders import ENCODERS, Encoder
from model.load import load_init
from model.objectives import OBJECTIVES, Metadata, Objective
from model.task import RetrievalTask
from model.teacher import CachedTeacher, Teacher
from utils.checkpoint import load_checkpoint
from utils.config import component_options, constructor_options, to_plain
from utils.errors import CheckpointError, ConfigError
from utils.registry import did_you_mean

TEACHER = "configs/lcr2s_teacher.yaml"  # trains a teacher, unless teacher.config names another one


def resolve_model(config: Config) -> Config:
    """The config with every option of its encoder and losses spelt out and checked.

    Raises:
        ConfigError: an unknown encoder, loss or option, or no loss at all.
    """
    model = to_plain(component_options(ENCODERS, config.model, "model"))
    losses = {name: to_plain(options) for name, (_, options) in _objectives(config).items()}
    return dataclasses.replace(config, model=model, losses=losses)


def build_task(
    config: Config, num_pids: int | None = None, *, weights: bool = True, teacher: bool = True
) -> RetrievalTask:
    """A task with its weights and its teacher, on the CPU. `task.notes` tells what was loaded.

    Args:
        config: the experiment.
        num_pids: number of training identities; None builds the encoder without losses, for evaluation.
        weights: load the towers' pretrained weights, or `init.path` in their place. False leaves random weights, for a
            checkpoint to be loaded over them.
        teacher: load the teacher that distillation losses need.

    Raises:
        ConfigError: as `resolve_model`; options contradict each other; a loss needs a teacher, and none is named.
        CheckpointError: `init.path` or the teacher cannot be read, or does not fit.
    """
    encoder = build_encoder(config, pretrained=weights and config.init.path is None)
    objectives = {} if num_pids is None else build_objectives(config, encoder, num_pids)
    if objectives and encoder.why_not_accumulate and config.train.accumulate > 1:
        raise ConfigError(
            f"train.accumulate: must be 1, got {config.train.accumulate}, because {encoder.why_not_accumulate}, "
            "or set train.accumulate=1"
        )
    if objectives and encoder.why_no_step and config.train.compile == "step":
        raise ConfigError(f"train.compile: cannot be step, because {encoder.why_no_step}")
    if objectives and encoder.why_not_shard and config.train.shard == "full":
        raise ConfigError(f"train.shard: must be none, got full, because {encoder.why_not_shard}")
    frozen: Teacher | CachedTeacher | None = None
    if objectives and teacher and needs_teacher(config):
        frozen = _as_configured(build_teacher(config), config)
    task = RetrievalTask(encoder, objectives, frozen)
    task.notes = [*encoder.notes, *_mixed_activations(encoder)]
    if weights and config.init.path is not None:
        report = load_init(task, config.init, config.data)
        task.weights_from = report.origin
        task.notes += [report.table(), *report.notes]
    return task


def random_task(config: Config, num_pids: int) -> RetrievalTask:
    """A task with random weights, and a random teacher if its losses need one.

    Args:
        config: the experiment.
        num_pids: number of training identities.

    Raises:
        ConfigError, CheckpointError: as `build_task`.
    """
    task = build_task(config, num_pids, weights=False, teacher=False)
    teacher = _as_configured(_random_teacher(config), config) if distils(config) else None
    return RetrievalTask(task.encoder, dict(task.named_objectives()), teacher)


def _mixed_activations(encoder: Encoder) -> list[str]:
    """A remark if the towers have different activations, as those of different CLIP models have."""
    if len(set(encoder.activations.values())) < 2:
        return []
    listed = ", ".join(f"{tower} {activation}" for tower, activation in encoder.activations.items())
    return [f"model: the towers have different activations ({listed}); both towers of a CLIP model have the same"]


def build_encoder(config: Config, *, pretrained: bool = True) -> Encoder:
    """The encoder of a config, with the pretrained weights of its towers or random ones.

    Raises:
        ConfigError: as `resolve_model`; `init.path` has the weights, and only `build_task` loads them.
    """
    if pretrained and config.init.path is not None:
        raise ConfigError("init.path: has the weights of this config; use build_task, which loads them")
    options = component_options(ENCODERS, config.model, "model")
    encoder: Callable[..., Encoder] = ENCODERS.get(options.pop("name"), "model.name")
    return encoder(config.data.image_size, config.data.text_length, pretrained, **options)


def build_objectives(config: Config, encoder: Encoder, num_pids: int) -> dict[str, Objective]:
    """Name -> objective of a config, for an encoder and a number of training identities."""
    metadata = Metadata(
        num_pids, encoder.embed_dim, encoder.vocab_size, noise_rate=config.data.noise_rate, dataset=config.data.dataset
    )
    return {name: objective(metadata, **options) for name, (objective, options) in _objectives(config).items()}


def distils(config: Config) -> bool:
    """True if a loss distils from a trained teacher."""
    teaches_itself = ENCODERS.get(config.model["name"], "model.name").teaches_itself
    return not teaches_itself and any(OBJECTIVES.get(name, f"losses.{name}").needs_teacher for name in config.losses)


def needs_teacher(config: Config) -> bool:
    """The same as `distils`.

    Raises:
        ConfigError: no teacher is named; the message shows how to train one.
    """
    if distils(config) and config.teacher.checkpoint is None:
        raise ConfigError(
            "teacher.checkpoint: the losses distil from a trained teacher, got none; train one with\n"
            f"  python train.py --config {config.teacher.config or TEACHER} --run runs/teacher\n"
            "and add to this command: --set teacher.checkpoint=runs/teacher/last.pt"
        )
    return distils(config)


def _as_configured(teacher: Teacher, config: Config) -> Teacher | CachedTeacher:
    """The teacher itself, or with the tables of `teacher.cache`."""
    return CachedTeacher(teacher) if config.teacher.cache else teacher


def build_teacher(config: Config) -> Teacher:
    """The teacher of a config, with its weights.

    Raises:
        ConfigError: it was trained on other images or with another tokenizer.
        CheckpointError: it is damaged, or no checkpoint of train.py.
    """
    trained, path = _trained_teacher(config)
    ready = dataclasses.replace(trained, init=InitConfig(path=path, format="own"))
    return Teacher(build_task(ready).encoder)


def _random_teacher(config: Config) -> Teacher:
    """A teacher of the same architecture with random weights; `teacher.config` describes it before it is trained.

    Raises:
        ConfigError, CheckpointError: as `build_teacher`.
    """
    untrained = config.teacher.checkpoint is None
    own = load_config(config.teacher.config or TEACHER) if untrained else _trained_teacher(config)[0]
    return Teacher(build_encoder(dataclasses.replace(own, init=InitConfig()), pretrained=False))


def _trained_teacher(config: Config) -> tuple[Config, str]:
    """The config inside the teacher's checkpoint, and the path of the checkpoint."""
    path = str(weights_file(str(config.teacher.checkpoint)))
    text = load_checkpoint(path).get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: has no config inside, so its encoder is unknown; use a checkpoint of train.py")
    try:
        trained = parse_config(text)
    except ConfigError as error:
        raise CheckpointError(f"{path}: the config inside does not fit this version ({error})") from None
    for name in ("image_size", "image_mean", "image_std", "tokenizer", "text_length"):
        theirs, ours = getattr(trained.data, name), getattr(config.data, name)
        if theirs != ours:
            raise ConfigError(f"data.{name}: the teacher ({path}) was trained with {theirs}, got {ours}; use the same")
    return trained, path


def _objectives(config: Config) -> dict[str, tuple[Callable[..., Objective], dict[str, Any]]]:
    if not config.losses:
        raise ConfigError(f"losses: needs at least one loss to train with; {did_you_mean('', OBJECTIVES)}")
    chosen: dict[str, tuple[Callable[..., Objective], dict[str, Any]]] = {}
    for name, options in config.losses.items():
        objective = OBJECTIVES.get(name, f"losses.{name}")
        chosen[name] = (objective, constructor_options(objective, options, f"losses.{name}"))
    if all(options["weight"] == 0 for _, options in chosen.values()):
        raise ConfigError(
            f"losses: nothing would be trained, because the weight of {', '.join(chosen)} is 0; give one a weight"
        )
    return chosen
