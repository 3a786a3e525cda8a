"""Reference of the options: every component is described, keys select sections."""

import re

import pytest

from datasets.transforms import AUGMENTATIONS
from model.encoders import ENCODERS
from model.objectives import OBJECTIVES
from processor.help import config_help, sections
from processor.trackers import TRACKERS
from solver.schedule import SCHEDULES
from utils.errors import ConfigError


def test_every_component_and_every_option_is_described() -> None:
    found = {section.key: section for section in sections()}
    for prefix, registry in (
        ("model", ENCODERS),
        ("losses", OBJECTIVES),
        ("solver.schedule", SCHEDULES),
        ("data.image_aug", AUGMENTATIONS),
        ("train.trackers", TRACKERS),
    ):
        assert {f"{prefix}.{name}" for name in registry} <= set(found)
    for section in found.values():
        assert section.description, section.key
        assert not [row.path for row in section.rows if not row.help], section.key


def test_every_number_has_a_bound() -> None:
    rows = [row for section in sections() for row in section.rows]
    unbounded = [row.path for row in rows if re.search(r"\b(int|float)\b", row.type) and ", " not in row.type]
    assert rows and not unbounded


def test_a_key_selects_a_section_or_an_option() -> None:
    text = config_help("losses.efa")
    assert "losses.efa.margin_text" in text and "losses.sdm" not in text
    assert "from 0 to 1" in config_help("data.text_aug") and "data.views" not in config_help("data.text_aug")
    assert all(f"losses.{name}" in config_help("losses") for name in ("sdm", "tal"))
    assert len(config_help()) > len(config_help("data")) > len(config_help("data.root"))
    assert "model.image.checkpointing" in config_help("model.clip")


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--help-config: unknown key 'losses\.smd'; did you mean 'losses\.sdm'"):
        config_help("losses.smd")
