"""An encoder from outside states its limits, and no generic file has to know it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import load_config
from model.build import build_task
from model.encoders import ENCODERS
from model.encoders.clip import CLIPEncoder
from model.load import load_weights
from processor.resolve import resolve
from processor.resume import other_settings
from tests.helpers.configs import ROOT, TINY, config_of
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError, ConfigError
from utils.options import option


@dataclasses.dataclass(frozen=True)
class Extra:
    """Options of the further module."""

    width: int = option(8, ge=1, help="width")
    fast: bool = option(False, help="compute differently", resumable=True)


class Outsider(CLIPEncoder):
    """CLIP with a further module and limits of its own.

    Args:
        extra: options of the module.
        limited: refuse tokens and micro-batches.
    """

    optional_modules = ("further.",)

    def __init__(
        self,
        image_size: tuple[int, int],
        text_length: int,
        pretrained: bool,
        *,
        extra: Extra = Extra(),
        limited: bool = False,
        **clip: Any,
    ) -> None:
        super().__init__(image_size, text_length, pretrained, **clip)
        self.further = torch.nn.Linear(extra.width, 1)
        if limited:
            self.why_no_tokens = "this encoder has none; set model.limited=false"
            self.why_not_accumulate = "this encoder is limited; set model.limited=false"
            self.why_not_shard = "this encoder is limited; set model.limited=false"


@pytest.fixture(autouse=True)
def outsider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS._components, "outsider", Outsider)


def tiny(*overrides: str) -> Any:
    return resolve(load_config(ROOT / "configs/irra.yaml", [*TINY, "model.name=outsider", *overrides]))


def test_its_limits_are_told_by_the_builder() -> None:
    assert build_task(tiny("train.accumulate=2"), 3).encoder.further is not None
    with pytest.raises(ConfigError, match=r"losses\.mlm: needs all tokens, but this encoder has none"):
        build_task(tiny("model.limited=true"), 3)
    with pytest.raises(ConfigError, match=r"train\.accumulate: must be 1, got 2, because this encoder is limited"):
        build_task(tiny("model.limited=true", "train.accumulate=2", "losses.mlm=null"), 3)
    with pytest.raises(ConfigError, match=r"train\.shard: must be none, got full, because this encoder is limited"):
        build_task(tiny("model.limited=true", "train.shard=full", "losses.mlm=null"), 3)
    with pytest.raises(ConfigError, match=r"train\.shard: must be none, got full, because a process without support"):
        build_task(config_of("lcr2s_teacher", Path("data"), "train.shard=full"), 3)


def test_blocks_are_the_repeated_modules_of_the_towers() -> None:
    encoder = build_task(tiny("model.image.options.depth=2"), 3).encoder
    assert [type(block).__name__ for block in encoder.blocks] == ["Block", "Block", "CLIPEncoderLayer"]


def test_a_checkpoint_may_lack_its_further_module_and_nothing_else(tmp_path: Path) -> None:
    task = build_task(tiny(), 3)
    state = {name: value for name, value in task.state_dict().items() if "further" not in name}
    save_checkpoint(tmp_path / "a.pt", {"model": state})
    report = load_weights(build_task(tiny()), tmp_path / "a.pt", format="own")
    assert report.missing == ["encoder.further.bias", "encoder.further.weight"]
    del state["encoder.image.projection.weight"]
    save_checkpoint(tmp_path / "b.pt", {"model": state})
    with pytest.raises(CheckpointError, match=r"1 tensors of the encoder are missing: encoder\.image\.projection"):
        load_weights(build_task(tiny()), tmp_path / "b.pt", format="own")
    plain = build_task(resolve(load_config(ROOT / "configs/irra.yaml", TINY)))
    save_checkpoint(tmp_path / "c.pt", {"model": task.state_dict()})
    assert "encoder.further.bias" in load_weights(plain, tmp_path / "c.pt", format="own").unexpected


def test_its_options_say_themselves_whether_a_resumed_run_may_change_them() -> None:
    assert other_settings(tiny(), tiny("model.extra.fast=true")) == []
    assert other_settings(tiny(), tiny("model.extra.width=4")) == ["model.extra.width: 8 -> 4"]
