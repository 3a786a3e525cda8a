"""Other weights and data sets through the command line: --weights, --on, init, and the report in the log."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import test as test_program
import train as train_program
from configs.schema import load_config
from processor import training
from processor.resolve import resolve
from tests.helpers.checkpoints import saved_vit
from tests.helpers.configs import ROOT, TINY
from tests.helpers.programs import evaluate, run_program


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of IRRA on the rendered data set."""
    config = resolve(load_config(ROOT / "configs/irra.yaml", [*TINY, f"data.root={root}"]))
    return training.train(config, tmp_path_factory.mktemp("transfer") / "run")


@pytest.fixture(scope="module")
def world(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with the rendered people as ICFG-PEDES (no val split) and as RSTPReid (val and test swapped)."""
    folder = tmp_path_factory.mktemp("world")
    rows = json.loads((root / "SyntheticPEDES/reid_raw.json").read_text())
    shutil.copytree(root / "SyntheticPEDES", folder / "SyntheticPEDES")
    for name, file in (("ICFG-PEDES", "ICFG_PEDES.json"), ("RSTPReid", "data_captions.json")):
        (folder / name).mkdir()
        (folder / name / "imgs").symlink_to(root / "SyntheticPEDES/imgs")
        field, splits = ("file_path", {"train": "train", "test": "test"})
        if name == "RSTPReid":
            field, splits = "img_path", {"train": "train", "val": "test", "test": "val"}
        chosen = [
            row | {field: row["file_path"], "split": splits[row["split"]]} for row in rows if row["split"] in splits
        ]
        (folder / name / file).write_text(json.dumps(chosen))
    return folder


def test_one_table_for_several_data_sets(finished: Path, world: Path, monkeypatch, capsys) -> None:
    arguments = ["--run", finished, "--on", "icfg_pedes", "rstpreid", "--i2t", "--set", f"data.root={world}"]
    status, out, error = run_program(test_program.main, monkeypatch, capsys, *arguments)
    assert status == 0, error
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows == ["task", "t2i icfg_pedes", "i2t icfg_pedes", "t2i rstpreid", "i2t rstpreid"]
    assert "best.pt, epoch 1, test split" in out


def test_numbers_on_another_data_set_are_those_of_its_images(finished: Path, world: Path) -> None:
    """ICFG-PEDES has the run's test images here, and RSTPReid its val images."""
    at = ["--set", f"data.root={world}"]
    test, val = evaluate("--run", finished)["t2i"], evaluate("--run", finished, "--split", "val")["t2i"]
    found = evaluate("--run", finished, "--on", "icfg_pedes", "rstpreid", *at)
    assert found == {"t2i icfg_pedes": test, "t2i rstpreid": val}
    assert evaluate("--run", finished, "--on", "synthetic", "rstpreid", "--split", "val", *at) == {
        "t2i synthetic": val,
        "t2i rstpreid": test,
    }


def test_the_tokenizer_is_the_one_that_was_trained_with(finished: Path, world: Path, tmp_path: Path) -> None:
    """The training data set need not be among the evaluated ones."""
    shutil.copytree(world, tmp_path / "copy", symlinks=True)
    merges = (tmp_path / "copy/SyntheticPEDES/tokenizer/tokenizer.json").rename(tmp_path / "tokenizer.json")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    merges.rename(tokenizer / "tokenizer.json")
    arguments = ["--run", finished, "--on", "icfg_pedes", "--set", f"data.root={tmp_path / 'copy'}"]
    found = evaluate(*arguments, f"data.tokenizer={tokenizer}")
    assert found == evaluate("--run", finished, "--on", "icfg_pedes", "--set", f"data.root={world}")


def test_weights_with_a_config_give_the_runs_numbers(finished: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((finished / "config.yaml").read_text())
    expected = evaluate("--run", finished)
    assert evaluate("--config", tmp_path / "mine.yaml", "--weights", finished / "last.pt") == expected
    assert (
        evaluate("--config", tmp_path / "mine.yaml", "--weights", finished / "best.pt", "--format", "own") == expected
    )
    assert evaluate("--run", finished, "--checkpoint", finished / "best.pt") == expected


def test_loading_says_what_became_of_every_tensor(finished: Path, monkeypatch, capsys) -> None:
    arguments = ["--config", finished / "config.yaml", "--weights", finished / "best.pt"]
    status, out, _ = run_program(test_program.main, monkeypatch, capsys, *arguments)
    assert status == 0 and f"weights from {finished / 'best.pt'}, format own" in out
    (unexpected,) = [line for line in out.splitlines() if "unexpected, not used" in line]
    assert "objectives.id 2" in unexpected and "objectives.mlm" in unexpected


def test_a_config_alone_is_evaluated_before_training(finished: Path, root: Path, monkeypatch, capsys) -> None:
    """Zero-shot evaluation, here of random weights and of a checkpoint."""
    arguments = ["--config", ROOT / "configs/baseline.yaml", "--set", *TINY, f"data.root={root}"]
    status, out, _ = run_program(test_program.main, monkeypatch, capsys, *arguments)
    assert status == 0 and "baseline before training, test split" in out
    arguments += [f"init.path={finished / 'best.pt'}"]
    status, out, _ = run_program(test_program.main, monkeypatch, capsys, *arguments)
    assert status == 0 and f"{finished / 'best.pt'}, epoch 1, test split" in out
    assert evaluate(*arguments) == evaluate("--run", finished)


def test_training_starts_from_anothers_weights_and_says_what_starts_fresh(
    finished: Path, root: Path, tmp_path: Path
) -> None:
    """Pretrained towers are not downloaded, since init.path overwrites them."""
    init = [f"init.path={finished / 'best.pt'}", "model.image.pretrained=true", "losses.itc={}", "solver.lr=0"]
    config = resolve(load_config(ROOT / "configs/irra.yaml", [*TINY, f"data.root={root}", *init]))
    run = training.train(config, tmp_path / "run")
    before = torch.load(finished / "best.pt", weights_only=True)["model"]
    after = torch.load(run / "last.pt", weights_only=True)["model"]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    log = (run / "train.log").read_text()
    assert f"weights from {finished / 'best.pt'}, format own" in log and "missing, initialised afresh" in log


def test_the_log_says_that_a_projection_starts_fresh(root: Path, tmp_path: Path) -> None:
    file, _ = saved_vit(tmp_path, num_classes=10)
    overrides = [*TINY, f"data.root={root}", f"model.image.pretrained={file}"]
    run = training.train(resolve(load_config(ROOT / "configs/baseline.yaml", overrides)), tmp_path / "run")
    assert (
        f"{file} has no projection to 64 dimensions (model.embed_dim), so it is initialised afresh"
        in (run / "train.log").read_text()
    )


def test_a_run_fine_tuned_from_weights_that_are_gone_is_still_evaluated(
    finished: Path, root: Path, tmp_path: Path
) -> None:
    shutil.copy(finished / "best.pt", tmp_path / "start.pt")
    overrides = [*TINY, f"data.root={root}", f"init.path={tmp_path / 'start.pt'}", "losses.mlm=null"]
    run = training.train(resolve(load_config(ROOT / "configs/irra.yaml", overrides)), tmp_path / "run")
    log = (run / "train.log").read_text()
    assert "unexpected, not used" in log and "objectives.mlm" in log
    (tmp_path / "start.pt").unlink()
    assert evaluate("--run", run)["t2i"]["R1"] >= 0


def test_training_on_a_data_set_without_val_carves_one(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    overrides = [*TINY, f"data.root={world}", "data.dataset=icfg_pedes", "data.val_ids=3"]
    tokenizer = f"data.tokenizer={world / 'SyntheticPEDES/tokenizer'}"
    arguments = ["--config", ROOT / "configs/irra.yaml", "--run", tmp_path / "run", "--set", *overrides, tokenizer]
    status, out, error = run_program(train_program.main, monkeypatch, capsys, *arguments)
    assert status == 0, error
    assert "held out 3 training identities (data.val_ids)" in out and "selected on val (best.pt)" in out
    (record,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert evaluate("--run", tmp_path / "run", "--split", "val")["t2i"] == record["val"]
    papers = [*arguments, "eval.select_on=test"]
    papers[3] = tmp_path / "papers"
    status, out, error = run_program(train_program.main, monkeypatch, capsys, *papers)
    assert status == 0, error
    assert "identities of train are val" not in out and "best on test (best.pt)" in out


def irras_own_config(folder: Path) -> Path:
    text = "batch_size: 64\nimg_size: !!python/tuple\n- 384\n- 128\n"
    (folder / "configs.yaml").write_text(text)
    return folder / "configs.yaml"


MISTAKES = {
    "weights with a run": (
        lambda run, folder: ["--run", run, "--weights", run / "best.pt"],
        "error: --weights, --format: need --config",
    ),
    "checkpoint with a config": (
        lambda run, folder: ["--config", run / "config.yaml", "--checkpoint", "last"],
        "error: --checkpoint: needs --run",
    ),
    "format alone": (
        lambda run, folder: ["--config", run / "config.yaml", "--format", "irra"],
        "error: --format: needs --weights",
    ),
    "format unknown": (
        lambda run, folder: ["--config", run / "config.yaml", "--weights", run / "best.pt", "--format", "ira"],
        "error: format: unknown checkpoint format 'ira'; did you mean 'irra'?",
    ),
    "weights gone": (
        lambda run, folder: ["--config", run / "config.yaml", "--weights", folder / "no.pth"],
        "no.pth: no such checkpoint",
    ),
    "data set unknown": (
        lambda run, folder: ["--run", run, "--on", "icfg_pede"],
        "error: data.dataset: unknown data set 'icfg_pede'; did you mean 'icfg_pedes'?",
    ),
    "data set gone": (lambda run, folder: ["--run", run, "--on", "rstpreid"], "RSTPReid: no such data set folder"),
    "dump of two": (
        lambda run, folder: ["--run", run, "--on", "synthetic", "rstpreid", "--dump", folder / "x"],
        "error: --dump: takes one data set",
    ),
    "IRRA's configs.yaml": (
        lambda run, folder: ["--config", irras_own_config(folder), "--weights", run / "best.pt"],
        "refused, because it would build Python objects; if it is the configs.yaml of a published model",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_exit_with_one_line(case: str, finished: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    make, message = MISTAKES[case]
    status, _, error = run_program(test_program.main, monkeypatch, capsys, *make(finished, tmp_path))
    assert status == 1 and message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


TRAIN_MISTAKES = {
    "init gone": (["init.path=/nowhere.pt"], "error: /nowhere.pt: no such checkpoint"),
    "init format": (
        ["init.path=/nowhere.pt", "init.format=ira", "--print-config"],
        "error: init.format: unknown checkpoint format 'ira'; did you mean 'irra'?",
    ),
    "too many held out": (["data.dataset=icfg_pedes"], "must be less than the 8 training identities"),
}


@pytest.mark.parametrize("case", TRAIN_MISTAKES)
def test_train_mistakes_exit_with_one_line(
    case: str, tiny: list[str], world: Path, monkeypatch, capsys, tmp_path: Path
) -> None:
    arguments, message = TRAIN_MISTAKES[case]
    start = ["--config", ROOT / "configs/irra.yaml", "--run", tmp_path / "run", "--set", *tiny, f"data.root={world}"]
    status, _, error = run_program(train_program.main, monkeypatch, capsys, *start, *arguments)
    assert status == 1 and message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
