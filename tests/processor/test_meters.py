"""Running means and the NaN check."""

import re
from pathlib import Path

import pytest
import torch

from configs.schema import DataConfig
from datasets.annotations import load_annotations
from datasets.pairs import TrainPairs
from processor.meters import Meters, NaNCheck
from utils.errors import TrainingError


def test_meters_average_over_pairs_not_batches() -> None:
    meters = Meters()
    meters.update({"loss": torch.tensor(1.0)}, 3)
    meters.update({"loss": torch.tensor(5.0)}, 1)
    assert meters.read() == {"loss": 2.0}


def test_the_watch_names_the_first_bad_step(root: Path) -> None:
    annotations = load_annotations("synthetic", root)
    pairs = TrainPairs(annotations.train, annotations.train_labels, None, None, (), 0, DataConfig())  # type: ignore[arg-type]
    watch = NaNCheck(pairs)
    watch.note(1, {"loss": torch.tensor(1.0)}, torch.tensor([0]))
    watch.check()
    watch.note(2, {"loss": torch.tensor(float("inf"))}, torch.tensor([5]))
    watch.note(3, {"loss": torch.tensor(float("nan"))}, torch.tensor([7]))
    with pytest.raises(TrainingError, match=rf"(?s)step 2: .*{re.escape(pairs.pairs[5].record.image_path)}"):
        watch.check()
