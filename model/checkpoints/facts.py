"""Facts about the training of a weights file: activations, preprocessing, image size; and comparison with ours."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from configs.schema import CLIP_MEAN, CLIP_STD, DataConfig
from utils.errors import CheckpointError

ACTIVATION_OPTIONS = {"image": "model.image.options.act_layer", "text": "model.text.options.hidden_act"}
TIMM_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}  # of Hugging Face's activations; others agree
Colour = tuple[float, ...]


@dataclass(frozen=True)
class Facts:
    """Facts of a weights file; None and empty where it does not tell."""

    source: str = "the file"  # what tells them
    image_size: tuple[int, int] | None = None
    square: bool = False  # its images are square
    activations: Mapping[str, str] = field(default_factory=dict)  # tower -> quick_gelu, gelu, ...
    image_mean: Colour | None = None
    image_std: Colour | None = None
    text_length: int | None = None  # longest captions in training


UNKNOWN = Facts()


def compare(facts: Facts, activations: Mapping[str, str], data: DataConfig | None, source: str | Path) -> list[str]:
    """Remarks on what is uncertain; a certain mismatch raises `CheckpointError`.

    Args:
        facts: facts of the file.
        activations: tower -> activation of the model.
        data: preprocessing; None leaves it out of the comparison.
        source: path of the file, for messages.
    """
    notes = []
    for tower, ours in activations.items():
        theirs, key = facts.activations.get(tower), ACTIVATION_OPTIONS[tower]
        if theirs is not None and theirs != ours:
            raise CheckpointError(
                f"{source}: its {tower} tower was trained with {theirs} ({facts.source}), got {ours}; "
                f"set {key}={theirs}"
            )
        if theirs is None:
            notes.append(
                f"activation of the {tower} tower: unknown to the file, {ours} in the model; OpenAI's CLIP has "
                f"quick_gelu, most of LAION's and open_clip's have gelu ({key})"
            )
    if data is None:
        return notes
    for name in ("image_mean", "image_std"):
        theirs, ours = getattr(facts, name), getattr(data, name)
        if theirs is not None and not all(math.isclose(*pair, abs_tol=1e-3) for pair in zip(theirs, ours, strict=True)):
            raise CheckpointError(
                f"{source}: was trained with data.{name}={list(theirs)} ({facts.source}), got {list(ours)}; set "
                f"data.image_mean={list(facts.image_mean or data.image_mean)} "
                f"data.image_std={list(facts.image_std or data.image_std)}"
            )
    if facts.image_mean is None and (data.image_mean, data.image_std) != (CLIP_MEAN, CLIP_STD):
        notes.append(
            f"data.image_mean: unknown to the file, {list(data.image_mean)} in the config; CLIP's is {list(CLIP_MEAN)}"
        )
    if facts.text_length is not None and facts.text_length < data.text_length:
        notes.append(
            f"data.text_length: {data.text_length}, but the training captions had at most {facts.text_length} tokens"
        )
    return notes
