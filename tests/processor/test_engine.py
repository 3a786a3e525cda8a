"""Remarks on the number of processes."""

from pathlib import Path

import pytest

from processor import engine
from processor.engine import process_notes
from tests.helpers.configs import config_of


def test_what_does_not_suit_the_processes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("irra", Path("data"), "train.accumulate=3", "train.shard=full")  # 8 pairs
    assert process_notes(config) == ["train.shard: has no effect with one process"]
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    assert process_notes(config) == []
    monkeypatch.setattr(engine, "world_size", lambda: 3)
    (note,) = process_notes(config)
    assert note.startswith("data.batch_size: 8 pairs are fewer than 9 micro-batches (3 processes, train.accumulate=3)")
