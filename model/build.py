"""Config -> encoder, task and teacher; every option checked and spelt out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import yaml

from configs.schema import Config
from model.encoders import ENCODERS, Encoder
from model.load import load_weights
from model.objectives import OBJECTIVES, Facts, Objective
from model.task import RetrievalTask
from model.teacher import Teacher
from utils.checkpoint import load_checkpoint
from utils.config import constructor_options, to_plain, typed
from utils.errors import CheckpointError, ConfigError
from utils.registry import did_you_mean


def resolve(config: Config) -> Config:
    """The config with every option of its encoder and losses spelt out, all of them checked.

    Raises:
        ConfigError: an unknown encoder, loss or option; no loss at all.
    """
    model = {"name": config.model.get("name"), **to_plain(_encoder(config)[1])}
    losses = {name: to_plain(options) for name, (_, options) in _objectives(config).items()}
    return dataclasses.replace(config, model=model, losses=losses)


def build_encoder(config: Config, *, pretrained: bool = True) -> Encoder:
    """The encoder of a config.

    Args:
        pretrained: False leaves out what `pretrained` options ask for, because a checkpoint is loaded over it, as it
            is where the config has an `init.path`.
    """
    encoder, options = _encoder(config)
    pretrained = pretrained and config.init.path is None
    return encoder(config.data.image_size, config.data.text_length, pretrained, **options)


def build_task(config: Config, num_pids: int | None, *, pretrained: bool = True) -> RetrievalTask:
    """The task of a config; raises `ConfigError` like `resolve`.

    Args:
        num_pids: training identities; None: the encoder alone, for evaluation.
        pretrained: as in `build_encoder`.
    """
    encoder = build_encoder(config, pretrained=pretrained)
    if num_pids is None:
        return RetrievalTask(encoder, {})
    facts = Facts(
        num_pids, encoder.embed_dim, encoder.vocab_size, noise_rate=config.data.noise_rate, dataset=config.data.dataset
    )
    if encoder.batch_statistics and config.train.accumulate > 1:
        raise ConfigError("train.accumulate: a part of a batch has not the batch statistics of all; model.bn=frozen")
    objectives = {name: objective(facts, **options) for name, (objective, options) in _objectives(config).items()}
    return RetrievalTask(encoder, objectives)


def needs_teacher(config: Config) -> bool:
    """Whether some loss distils, and the encoder does not teach itself.

    Raises:
        ConfigError: that is so, and no teacher is named; the message says how to make one.
    """
    if ENCODERS.get(config.model["name"], "model.name").teaches or not any(
        OBJECTIVES.get(name, f"losses.{name}").needs_teacher for name in config.losses
    ):
        return False
    if config.teacher.checkpoint is None:
        make = config.teacher.config or "configs/lcr2s_teacher.yaml"
        raise ConfigError(
            "teacher.checkpoint: this config distils from a trained teacher, and none is named; to make one:\n"
            f"  python train.py --config {make} --run runs/teacher\n"
            "then give this command also: --set teacher.checkpoint=runs/teacher/last.pt"
        )
    return True


def build_teacher(config: Config) -> Teacher:
    """The teacher of a config, built as its own checkpoint says.

    Raises:
        ConfigError: it was trained on other images or with another tokenizer.
        CheckpointError: it is no checkpoint of train.py, or damaged.
    """
    path = str(config.teacher.checkpoint)
    text = load_checkpoint(path).get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: is no checkpoint of train.py, so it does not say how its encoder is built")
    try:
        own = typed(Config, yaml.safe_load(text))
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: the config in it is not one of this version ({error})") from None
    for name in ("image_size", "image_mean", "image_std", "tokenizer", "text_length"):
        theirs, ours = getattr(own.data, name), getattr(config.data, name)
        if theirs != ours:
            raise ConfigError(f"data.{name}: {ours}, but the teacher ({path}) was trained with {theirs}")
    task = build_task(own, None, pretrained=False)
    load_weights(task, path, format="own")
    return Teacher(task.encoder)


def _encoder(config: Config) -> tuple[Callable[..., Encoder], dict[str, Any]]:
    if not isinstance(config.model.get("name"), str):
        raise ConfigError(f"model.name: which encoder? {did_you_mean('', ENCODERS)}")
    encoder = ENCODERS.get(config.model["name"], "model.name")
    options = {key: value for key, value in config.model.items() if key != "name"}
    return encoder, constructor_options(encoder, options, "model")


def _objectives(config: Config) -> dict[str, tuple[Callable[..., Objective], dict[str, Any]]]:
    if not config.losses:
        raise ConfigError(f"losses: there is none to train with; {did_you_mean('', OBJECTIVES)}")
    found: dict[str, tuple[Callable[..., Objective], dict[str, Any]]] = {}
    for name, options in config.losses.items():
        objective = OBJECTIVES.get(name, f"losses.{name}")
        found[name] = (objective, constructor_options(objective, options, f"losses.{name}"))
    return found
