"""Runs on noisy pairs: every method with noise, and RDE with its per-epoch division."""

from pathlib import Path

import numpy as np
import pytest

from datasets.noise import noise_permutation
from processor import training
from tests.helpers.configs import NOISE, ROOT, rde_config
from tests.helpers.programs import evaluate
from tests.helpers.runs import TIMING, lines_of

METHODS = {
    "baseline": "itc",
    "irra": "sdm",
    "fmfa": "asdm",
    "ivt": "cmpm",
    "rde": "tal",
}


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_an_option_of_every_method(method: str, root: Path, tmp_path: Path) -> None:
    config = rde_config(root, NOISE, config=ROOT / f"configs/{method}.yaml")
    run = training.train(config, tmp_path / "run")
    index = np.load(run / "noise.npy")
    assert np.array_equal(index, noise_permutation(32, 0.5)) and index.dtype == np.int64
    moved = int((index != np.arange(32)).sum())
    log = (run / "train.log").read_text()
    assert f"noise replaced {moved} of 32 training captions" in log
    (line,) = lines_of(run)
    clean, noisy = line[f"{METHODS[method]}_loss_clean"], line[f"{METHODS[method]}_loss_noisy"]
    assert clean != noisy
    assert f"{METHODS[method]}_loss_clean: " in log
    if method not in ("rde",):  # RDE's loss is a sum over the clean mask
        mean = (clean * (32 - moved) + noisy * moved) / 32
        assert line[f"{METHODS[method]}_loss"] == pytest.approx(mean, rel=1e-4) or config.data.sampler == "identity"
    assert all(split in line for split in ("val", "test"))


def test_without_noise_nothing_of_it_is_written(root: Path, tmp_path: Path) -> None:
    run = training.train(rde_config(root), tmp_path / "run")
    assert not (run / "noise.npy").exists()
    (line,) = lines_of(run)
    assert "tal_counted" in line and not [name for name in line if "clean" in name or "noisy" in name]


def test_a_run_of_rde(root: Path, tmp_path: Path) -> None:
    """RDE splits the pairs before every epoch; test.py reproduces its metrics and reports both embeddings."""
    fast = ["solver.lr=5e-4", "solver.eps=1e-8", "solver.schedule.warmup_epochs=0", "solver.rules=[]"]
    config = rde_config(root, NOISE, *fast, "train.epochs=3", "model.selected_dim=48")
    run = training.train(config, tmp_path / "run")
    lines = lines_of(run)
    for line in lines:
        parts = [line[f"tal_counted{part}"] for part in ("", "_clean", "_noisy")]
        assert all(0 <= part <= 1 for part in parts)
        moved = (np.load(run / "noise.npy") != np.arange(32)).mean()
        assert parts[0] == pytest.approx((1 - moved) * parts[1] + moved * parts[2])
    log = (run / "train.log").read_text()
    assert log.count("before training: tal_counted: ") == 3
    assert "selected on val" in log and "last epoch" in log
    for name, record in (("last", lines[-1]), ("best", max(lines, key=lambda line: line["val"]["R1"]))):
        results = evaluate("--run", run, "--checkpoint", name, "--i2t")
        assert results["t2i"] == record["test"]
        assert set(results) == {"t2i", "t2i bge only", "t2i tse only", "i2t"}
        assert len({results[row]["mAP"] for row in ("t2i", "t2i bge only", "t2i tse only")}) == 3


def test_two_runs_of_rde_are_the_same(root: Path, tmp_path: Path) -> None:
    runs = [lines_of(training.train(rde_config(root, NOISE, "train.epochs=2"), tmp_path / name)) for name in ("a", "b")]
    first, second = ([{k: v for k, v in line.items() if k not in TIMING} for line in lines] for lines in runs)
    assert first == second


def test_clean_pairs_alone_can_be_trained_on(root: Path, tmp_path: Path) -> None:
    config = rde_config(root, NOISE, "data.noise_drop=true", config=ROOT / "configs/baseline.yaml")
    run = training.train(config, tmp_path / "run")
    (line,) = lines_of(run)
    assert line["itc_loss_clean"] == pytest.approx(line["itc_loss"]) and "itc_loss_noisy" not in line
