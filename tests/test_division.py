"""Training on noisy pairs: what a run writes, and that RDE's division sees every pair once, whoever loads it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_program
from configs.schema import Config, load_config
from datasets.annotations import load_annotations
from datasets.loaders import OTHER_DRAWS, TrainLoader, build_train_loader, data_tokenizer
from datasets.noise import noise_permutation
from model.build import build_task, resolve
from model.objectives import PairObjective
from model.objectives.consensus import FITS
from model.task import RetrievalTask
from processor.clean_pairs import divide_pairs, pair_losses
from tests.conftest import ROOT, TINY, TINY_IVT
from tests.test_transfer import evaluate
from utils.errors import TrainingError

RDE = ROOT / "configs/rde.yaml"
NOISE = "data.noise_rate=0.5"
CPU = {"device": torch.device("cpu"), "precision": "fp32"}


def rde_config(root: Path, *overrides: str, config: Path = RDE) -> Config:
    tiny = TINY_IVT if "ivt" in config.name else TINY
    return resolve(load_config(config, [*tiny, f"data.root={root}", *overrides]))


def loader_of(config: Config, task: RetrievalTask) -> TrainLoader:
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024, kinds=task.encoder.tokenizers)
    return build_train_loader(
        config.data,
        annotations,
        tokenizer,
        fields=task.inputs | {"index", "clean"},
        full_text=task.full_text,
        seed=config.train.seed,
        pin_memory=False,
    )


def task_of(config: Config) -> RetrievalTask:
    torch.manual_seed(0)
    return build_task(config, num_pids=8)


# --- the pass over all pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "identity"])
def test_every_pair_comes_once_whatever_the_sampler(root: Path, sampler: str) -> None:
    config = rde_config(root, f"data.sampler={sampler}")
    loader = loader_of(config, task_of(config))
    for epoch in (1, 2):
        batches = [batch["index"].tolist() for batch in loader.every_pair(epoch)]
        assert Counter(place for batch in batches for place in batch) == Counter(range(len(loader.pairs)))
        assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    assert [b["index"].tolist() for b in loader.every_pair(1)] == [b["index"].tolist() for b in loader.every_pair(1)]
    assert batches != [batch["index"].tolist() for batch in loader.every_pair(1)]


def test_its_draws_are_others_than_the_epochs_and_leave_those_alone(root: Path) -> None:
    config = rde_config(root)
    loader = loader_of(config, task_of(config))
    before = list(loader.epoch(1))
    divided = list(loader.every_pair(1))
    after = list(loader.epoch(1))
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert [batch["index"].tolist() for batch in divided] != [batch["index"].tolist() for batch in before]
    trained, passed = (
        {int(i): image for batch in batches for i, image in zip(batch["index"], batch["images"], strict=True)}
        for batches in (before, divided)
    )
    assert sum(not torch.equal(trained[i], passed[i]) for i in trained) > len(trained) // 2
    assert OTHER_DRAWS > 10**9


def test_losses_are_those_of_each_pair_in_its_batch(root: Path) -> None:
    config = rde_config(root, NOISE)
    task = task_of(config)
    loader, objective = loader_of(config, task), task.objectives["tal"]
    assert isinstance(objective, PairObjective)
    task.train()
    losses, known = pair_losses(task, {"tal": objective}, loader, 3, **CPU)  # type: ignore[arg-type]
    assert not task.training and known.all() and losses["tal"].shape == (2, 32)
    assert not losses["tal"].requires_grad
    for batch in loader.every_pair(3):
        with torch.no_grad():
            expected = objective.pair_losses(task.encode(batch))
        torch.testing.assert_close(losses["tal"][:, batch["index"]], expected)


def test_workers_do_not_matter(root: Path) -> None:
    decisions = []
    for workers in (0, 1):
        config = rde_config(root, NOISE, f"data.workers={workers}")
        task = task_of(config)
        loader = loader_of(config, task)
        for epoch in (1, 2):
            divide_pairs(task, loader, epoch, seed=1, **CPU)  # type: ignore[arg-type]
            decisions.append(task.objectives["tal"].counted.clone())  # type: ignore[union-attr, operator]
            list(loader.epoch(epoch))
    assert torch.equal(decisions[0], decisions[2]) and torch.equal(decisions[1], decisions[3])


def test_a_pair_with_three_texts_has_the_mean_of_its_rows(root: Path) -> None:
    config = rde_config(root, "losses.cmpm.consensus=auto", "data.batch_size=4", config=ROOT / "configs/ivt.yaml")
    assert config.data.views == 3
    task = task_of(config)
    loader, objective = loader_of(config, task), task.objectives["cmpm"]
    losses, _ = pair_losses(task, {"cmpm": objective}, loader, 1, **CPU)  # type: ignore[arg-type, dict-item]
    batch = next(iter(loader.every_pair(1)))
    assert len(batch["images"]) == 3 * len(batch["index"])
    with torch.no_grad():
        rows = objective.pair_losses(task.encode(batch))[0]  # type: ignore[operator, union-attr]
    expected = [rows[3 * place : 3 * place + 3].mean() for place in range(len(batch["index"]))]
    torch.testing.assert_close(losses["cmpm"][0, batch["index"]], torch.stack(expected))


def test_a_pair_whose_image_is_skipped_is_not_asked_for(root: Path) -> None:
    config = rde_config(root, "data.on_bad_image=skip")
    task = task_of(config)
    loader = loader_of(config, task)
    loader.pairs.images.paths[5] = "/nowhere.jpg"
    values = divide_pairs(task, loader, 1, seed=1, **CPU)  # type: ignore[arg-type]
    _, known = pair_losses(task, {"tal": task.objectives["tal"]}, loader, 1, **CPU)  # type: ignore[arg-type, dict-item]
    assert known.tolist() == [place != 5 for place in range(32)]
    assert task.objectives["tal"].counted[5] and 0 < values["tal_counted"] <= 1  # type: ignore[index, union-attr]


def test_without_consensus_there_is_no_pass(root: Path) -> None:
    config = rde_config(root, "losses.tal.consensus=null")
    task = task_of(config)
    loader = loader_of(config, task)
    loader.every_pair = None  # type: ignore[assignment, method-assign]
    assert divide_pairs(task, loader, 1, seed=1, **CPU) == {}  # type: ignore[arg-type]
    assert task.objectives["tal"].counted is None


def test_coins_are_thrown_by_seed_and_epoch_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = rde_config(root)
    task = task_of(config)
    loader, thrown = loader_of(config, task), []

    def divide(self: PairObjective, losses: torch.Tensor, known: torch.Tensor, rng: np.random.Generator) -> None:
        thrown.append(float(rng.random()))
        self.counted = torch.ones_like(known)

    monkeypatch.setattr(PairObjective, "divide", divide)
    for epoch, seed in ((1, 1), (2, 1), (1, 2), (1, 1)):
        divide_pairs(task, loader, epoch, seed=seed, **CPU)  # type: ignore[arg-type]
    assert thrown[0] == thrown[3] and len(set(thrown)) == 3


@pytest.mark.parametrize(
    "overrides, fit",
    [([], "short"), ([NOISE], "long"), (["data.dataset=rstpreid"], "long"), (["data.noise_rate=0.2"], "short")],
)
def test_the_fit_follows_the_noise_and_the_data_set(overrides: list[str], fit: str, root: Path) -> None:
    task = task_of(rde_config(root, *overrides))
    assert task.objectives["tal"].fit == FITS[fit]  # type: ignore[union-attr]


def test_a_model_that_has_diverged_stops_with_a_message(root: Path) -> None:
    config = rde_config(root)
    task = task_of(config)
    torch.nn.init.constant_(task.encoder.selection["text"].skip.bias, float("nan"))  # type: ignore[arg-type, index, union-attr]
    with pytest.raises(TrainingError, match="the losses of 32 of 32 training pairs are not finite"):
        divide_pairs(task, loader_of(config, task), 1, seed=1, **CPU)  # type: ignore[arg-type]


# --- runs -----------------------------------------------------------------------------------------------------------


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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
    run = train_program.train(config, tmp_path / "run")
    index = np.load(run / "noise.npy")
    assert np.array_equal(index, noise_permutation(32, 0.5)) and index.dtype == np.int64
    moved = int((index != np.arange(32)).sum())
    log = (run / "train.log").read_text()
    assert f"{moved} of 32 training captions are another pair's" in log
    (line,) = lines_of(run)
    clean, noisy = line[f"{METHODS[method]}_loss_clean"], line[f"{METHODS[method]}_loss_noisy"]
    assert clean != noisy
    assert f"{METHODS[method]}_loss_clean: " in log
    if method not in ("rde",):  # there it is a sum, of the pairs that count
        mean = (clean * (32 - moved) + noisy * moved) / 32
        assert line[f"{METHODS[method]}_loss"] == pytest.approx(mean, rel=1e-4) or config.data.sampler == "identity"
    assert all(split in line for split in ("val", "test"))


def test_without_noise_nothing_of_it_is_written(root: Path, tmp_path: Path) -> None:
    run = train_program.train(rde_config(root), tmp_path / "run")
    assert not (run / "noise.npy").exists()
    (line,) = lines_of(run)
    assert "tal_counted" in line and not [name for name in line if "clean" in name or "noisy" in name]


def test_a_run_of_rde(root: Path, tmp_path: Path) -> None:
    """It divides before every epoch, and test.py gives its numbers again, and those of both embeddings."""
    fast = ["solver.lr=5e-4", "solver.eps=1e-8", "solver.schedule.warmup_epochs=0", "solver.rules=[]"]
    config = rde_config(root, NOISE, *fast, "train.epochs=3", "model.selected_dim=48")
    run = train_program.train(config, tmp_path / "run")
    lines = lines_of(run)
    for line in lines:
        parts = [line[f"tal_counted{part}"] for part in ("", "_clean", "_noisy")]
        assert all(0 <= part <= 1 for part in parts)
        moved = (np.load(run / "noise.npy") != np.arange(32)).mean()
        assert parts[0] == pytest.approx((1 - moved) * parts[1] + moved * parts[2])
    log = (run / "train.log").read_text()
    assert log.count("pairs that count: tal_counted: ") == 3
    assert "selected on val" in log and "last epoch" in log
    for name, record in (("last", lines[-1]), ("best", max(lines, key=lambda line: line["val"]["R1"]))):
        results = evaluate("--run", run, "--checkpoint", name, "--i2t")
        assert results["t2i"] == record["test"]
        assert set(results) == {"t2i", "t2i bge only", "t2i tse only", "i2t"}
        assert len({results[row]["mAP"] for row in ("t2i", "t2i bge only", "t2i tse only")}) == 3


def test_two_runs_of_rde_are_the_same(root: Path, tmp_path: Path) -> None:
    runs = [
        lines_of(train_program.train(rde_config(root, NOISE, "train.epochs=2"), tmp_path / name)) for name in ("a", "b")
    ]
    timing = ("seconds", "samples_per_second", "peak_memory_gib")
    first, second = ([{k: v for k, v in line.items() if k not in timing} for line in lines] for lines in runs)
    assert first == second


def test_clean_pairs_alone_can_be_trained_on(root: Path, tmp_path: Path) -> None:
    config = rde_config(root, NOISE, "data.noise_drop=true", config=ROOT / "configs/baseline.yaml")
    run = train_program.train(config, tmp_path / "run")
    (line,) = lines_of(run)
    assert line["itc_loss_clean"] == pytest.approx(line["itc_loss"]) and "itc_loss_noisy" not in line
