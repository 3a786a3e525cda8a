"""Configs of earlier versions, mapped to the present schema."""

from collections.abc import Mapping
from typing import Any

from utils.yaml_text import settled

# Version 0.1 wrote all of these for every schedule.
SCHEDULE_0_1 = {
    *("name", "warmup_epochs", "warmup_factor", "warmup", "warmup_lr", "min_lr", "milestones", "gamma", "power"),
}
WARMUP = {"warmup_epochs", "warmup_factor", "warmup"}
SCHEDULE_OPTIONS = {
    "cosine": {*WARMUP, "min_lr"},
    "timm_cosine": {"warmup_epochs", "warmup_lr", "min_lr"},
    "step": {*WARMUP, "milestones", "gamma"},
    "linear": WARMUP,
    "exp": {*WARMUP, "power"},
    "poly": {*WARMUP, "power", "min_lr"},
    "constant": WARMUP,
}


def upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """Map the config that an earlier version saved in a run folder or a checkpoint; others stay as they are."""
    return _compile(_schedule(data))


def _compile(data: dict[str, Any]) -> dict[str, Any]:
    """`train.compile` was true or false."""
    train = data.get("train")
    if isinstance(train, Mapping) and isinstance(compiled := settled(train.get("compile")), bool):
        return data | {"train": {**train, "compile": "towers" if compiled else "none"}}
    return data


def _schedule(data: dict[str, Any]) -> dict[str, Any]:
    schedule = data.get("solver", {}).get("schedule") if isinstance(data.get("solver"), Mapping) else None
    if isinstance(schedule, Mapping) and schedule.keys() == SCHEDULE_0_1:
        kept = {"name", *SCHEDULE_OPTIONS.get(schedule["name"], SCHEDULE_0_1)}
        schedule = {key: value for key, value in schedule.items() if key in kept}
        return data | {"solver": data["solver"] | {"schedule": schedule}}
    return data
