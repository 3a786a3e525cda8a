"""Readers of the facts of a weights file: from the config inside, from JSON files beside it, or as published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig

from configs.schema import CLIP_MEAN, CLIP_STD, Config, parse_config
from model.checkpoints.facts import TIMM_NAMES, UNKNOWN, Colour, Facts
from model.encoders import ENCODERS
from utils.config import component_options
from utils.errors import CheckpointError, ConfigError

QUICK = {"image": "quick_gelu", "text": "quick_gelu"}
IRRA = Facts("as published", (384, 128), activations=QUICK, image_mean=CLIP_MEAN, image_std=CLIP_STD)
IVT = Facts(
    "as published", (384, 128), activations={"image": "gelu"}, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
)
PUBLISHED = {"irra": IRRA, "fmfa": IRRA, "rde": IRRA, "mllm4text": IRRA, "ham": IRRA, "ivt": IVT}


def facts_of(format: str, content: Mapping[str, Any], state: Mapping[str, Tensor], path: str | Path) -> Facts:
    """The facts of a file.

    Args:
        format: its format.
        content: content of the file.
        state: the tensors in it, with their names there.
        path: file or folder; descriptions beside it are read.

    Raises:
        CheckpointError: a description beside the file is damaged.
    """
    path = Path(path)
    if format == "own":
        return _own(content)
    if format == "huggingface":
        return _hugging_face(path if path.is_dir() else path.parent)
    if format == "openai":
        return _openai(state, path.parent)
    return PUBLISHED[format]


def _own(content: Mapping[str, Any]) -> Facts:
    """Facts of the config inside; none if there is no config, or one of another version."""
    try:
        config = parse_config(str(content["config"]))
    except (KeyError, ConfigError):
        return UNKNOWN
    data = config.data
    return Facts(
        "the config inside",
        data.image_size,
        activations=_activations(config),
        image_mean=data.image_mean,
        image_std=data.image_std,
        text_length=data.text_length,
    )


def _activations(config: Config) -> Mapping[str, str]:
    """The activations of the encoder of a config, built without memory."""
    try:
        options = component_options(ENCODERS, config.model, "model")
        encoder = ENCODERS.get(options.pop("name"), "model.name")
        with torch.device("meta"):
            return encoder(config.data.image_size, config.data.text_length, False, **options).activations
    except ConfigError:  # for instance, the folder of its text tower is gone
        return {}


def _openai(state: Mapping[str, Tensor], folder: Path) -> Facts:
    """OpenAI's files hold three constants; open_clip's have the same names of weights, and at best a description."""
    if {"input_resolution", "context_length", "vocab_size"} <= state.keys():
        return Facts("OpenAI's CLIP", square=True, activations=QUICK, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    description = _described(folder / "open_clip_config.json")
    model, images = (_mapping(description.get(key)) for key in ("model_cfg", "preprocess_cfg"))
    if not model:
        return Facts("CLIP's images are square", square=True)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return Facts(
        "open_clip_config.json",
        _size(_mapping(model.get("vision_cfg")).get("image_size")),
        square=True,
        activations={"image": activation, "text": activation},
        image_mean=_colour(images.get("mean")),
        image_std=_colour(images.get("std")),
    )


def _hugging_face(folder: Path) -> Facts:
    description, images = (_described(folder / name) for name in ("config.json", "preprocessor_config.json"))
    mean, std = (_colour(images.get(name)) for name in ("image_mean", "image_std"))
    if not {"vision_config", "text_config", "vision_config_dict", "text_config_dict"} & description.keys():
        return Facts("preprocessor_config.json", square=True, image_mean=mean, image_std=std)
    try:
        clip = CLIPConfig.from_dict(dict(description))
    except Exception as error:  # transformers raises errors of many types
        raise CheckpointError(f"{folder / 'config.json'}: describes no CLIP ({error})") from None
    activations = {"image": clip.vision_config.hidden_act, "text": clip.text_config.hidden_act}
    return Facts(
        "config.json, preprocessor_config.json",
        _size(clip.vision_config.image_size),
        square=True,
        activations={tower: TIMM_NAMES.get(name, name) for tower, name in activations.items()},
        image_mean=mean,
        image_std=std,
    )


def _described(path: Path) -> Mapping[str, Any]:
    """The content of a JSON file; empty without one."""
    if not path.is_file():
        return {}
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or no JSON ({error})") from None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _colour(value: Any) -> Colour | None:
    good = isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(one, int | float) for one in value)
    return tuple(map(float, value)) if good else None


def _size(value: Any) -> tuple[int, int] | None:
    values = list(value) if isinstance(value, list | tuple) else [value, value]
    return (values[0], values[1]) if len(values) == 2 and all(isinstance(one, int) for one in values) else None
