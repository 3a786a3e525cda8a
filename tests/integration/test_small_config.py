"""configs/cuhk_small.yaml trains and evaluates on the real layouts with nothing but the data and this repository."""

from pathlib import Path

import pytest

from configs.schema import load_config
from processor import training
from processor.resolve import resolve
from tests.helpers.configs import CONFIGS
from tests.helpers.layouts import LAYOUTS, write_layout
from tests.helpers.programs import evaluate
from tests.helpers.runs import lines_of

FAST = ["train.epochs=1", "data.workers=0", "data.batch_size=8"]


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_data_set_trains_without_any_download(dataset: str, root: Path, tmp_path: Path) -> None:
    write_layout(root, tmp_path, dataset, longest="a red coat and " * 40)
    overrides = [f"data.dataset={dataset}", f"data.root={tmp_path}", "data.val_ids=2", *FAST]
    run = training.train(resolve(load_config(CONFIGS / "cuhk_small.yaml", overrides)), tmp_path / "run")
    log = (run / "train.log").read_text()
    captions = 24 if dataset == "icfg_pedes" else 32
    assert (
        f"data.text_length: 1 of {captions} training captions are longer than 77 tokens and are cut; the longest" in log
    )
    (row,) = evaluate("--run", run, "--checkpoint", "last").values()  # learns the same vocabulary
    assert row["R1"] == lines_of(run)[-1]["test"]["R1"]
