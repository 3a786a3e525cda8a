"""A run of six epochs from YAML to metrics: its folder, log and tables, and test.py on its checkpoints."""

import json
import re
from pathlib import Path

import pytest
import torch

import test as test_program
from configs.schema import load_config
from processor import testing, training
from processor.evaluator import METRICS
from processor.resolve import resolve
from solver.schedule import lr_at
from tests.helpers.configs import TINY, irra_config
from tests.helpers.runs import lines_of
from utils.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of six epochs that overfits its eight training identities."""
    run = tmp_path_factory.mktemp("finished") / "run"
    overrides = [
        "train.epochs=6",
        "solver.lr=5e-4",
        "solver.eps=1e-8",
        "solver.schedule.warmup_epochs=1",
        "eval.every=2",
    ]
    config = irra_config([*TINY, f"data.root={root}"], *overrides)
    return training.train(config, run)


def test_a_run_folder_holds_everything(finished: Path) -> None:
    names = {path.name.split(".")[0] if path.name.startswith("events") else path.name for path in finished.iterdir()}
    assert names == {".lock", "config.yaml", "train.log", "metrics.jsonl", "best.pt", "last.pt", "events"}
    assert resolve(load_config(finished / "config.yaml")).train.epochs == 6
    last, best = load_checkpoint(finished / "last.pt"), load_checkpoint(finished / "best.pt")
    assert last["epoch"] == 6 and {"model", "training", "config", "metrics"} <= set(last)
    lines = lines_of(finished)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines if "val" in line] == [2, 4, 6]
    first_best = max((line for line in lines if "val" in line), key=lambda line: line["val"]["R1"])
    assert best["epoch"] == first_best["epoch"] and best["metrics"]["val"] == first_best["val"]


def test_the_losses_fall(finished: Path) -> None:
    lines = lines_of(finished)
    for name in ("loss", "sdm_loss", "id_loss", "mlm_loss"):
        assert lines[-1][name] < lines[0][name]
    assert lines[0]["lr"] == pytest.approx(5e-5) and lines[1]["lr"] == pytest.approx(5e-4)
    assert all(line["samples_per_second"] > 0 and line["peak_memory_gib"] > 0 for line in lines)


def test_each_parameter_group_has_the_scheduled_rate_of_its_own_base(finished: Path) -> None:
    config, last = load_config(finished / "config.yaml"), load_checkpoint(finished / "last.pt")
    groups = last["training"]["optimizer"]["param_groups"]
    assert {round(group["base_lr"] / 5e-4) for group in groups} == {1, 2, 5}
    for group in groups:
        expected = lr_at(6, group["base_lr"], epochs=6, **config.solver.schedule)
        assert group["lr"] == pytest.approx(expected)


def test_log_lines_have_the_fields_shape(finished: Path) -> None:
    log = (finished / "train.log").read_text()
    assert re.search(
        r"Epoch\[1\] Iteration\[2/4\], loss: [\d.]+, sdm_loss: [\d.]+, id_loss: [\d.]+, img_acc: [\d.]+, "
        r"txt_acc: [\d.]+, mlm_loss: [\d.]+, mlm_acc: [\d.]+, Base Lr: 5\.00e-05",
        log,
    )
    assert re.search(
        r"Epoch 1 done\. Time per batch: [\d.]+\[s\] Speed: [\d.]+\[samples/s\] Peak memory: [\d.]+\[GiB\]", log
    )
    assert re.search(r"subset +ids +images +captions\ntrain +8 +16 +32\nval +3 +6 +12\ntest +4 +8 +16", log)
    assert re.search(r"\| +task +\| +R1 +\| +R5 +\| +R10 +\| +mAP +\| +mINP +\|", log)


def test_the_final_table_has_three_rows_of_test_numbers(finished: Path) -> None:
    log, lines = (finished / "train.log").read_text(), [line for line in lines_of(finished) if "test" in line]
    chosen = {
        r"selected on val \(best.pt\)": max(lines, key=lambda line: line["val"]["R1"]),
        "last epoch": lines[-1],
        "best on test": max(lines, key=lambda line: line["test"]["R1"]),
    }
    for name, line in chosen.items():
        numbers = r" +\| +".join([str(line["epoch"]), *(re.escape(f"{line['test'][key]:.2f}") for key in METRICS)])
        assert re.search(rf"\| +{name} +\| +{numbers} +\|", log), name
    assert "protocol: t2i, whole gallery, no camera filter" in log
    best = chosen[r"selected on val \(best.pt\)"]
    assert f"best R1: {best['val']['R1']:.2f} at epoch {best['epoch']} (on val)" in log


def test_tensorboard_has_every_number(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished)).Reload()
    assert {"loss", "sdm_loss", "mlm_acc", "lr", "val/R1", "test/mINP"} <= set(board.Tags()["scalars"])
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in lines_of(finished)]
    )


# --- test.py on its checkpoints ---------------------------------------------------------------------------------------


def run_test_program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["test.py", *map(str, arguments)])
    test_program.main()


@pytest.mark.parametrize("checkpoint", ["best", "last", "path"])
def test_test_program_reproduces_the_logged_numbers(
    checkpoint: str, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished / ("last.pt" if checkpoint != "best" else "best.pt")
    recorded = load_checkpoint(file)["metrics"]
    results = {}
    evaluate = testing.evaluate
    monkeypatch.setattr(testing, "evaluate", lambda *given: results.update(evaluate(*given)))
    dump = tmp_path / "ranks.jsonl"
    name = file if checkpoint == "path" else checkpoint
    run_test_program(monkeypatch, "--run", finished, "--checkpoint", name, "--i2t", "--dump", dump)
    assert results["t2i"] == recorded["test"]  # bitwise
    assert set(results) == {"t2i", "i2t"}
    printed = capsys.readouterr().out
    assert "| t2i  |" in printed and "| i2t  |" in printed

    lines = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(lines) == 16
    assert 100 * sum(line["rank"] == 1 for line in lines) / len(lines) == pytest.approx(results["t2i"]["R1"])
    assert 100 * sum(line["AP"] for line in lines) / len(lines) == pytest.approx(results["t2i"]["mAP"])
    for line in lines:
        hits = [number for number, found in enumerate(line["top"], start=1) if found["pid"] == line["pid"]]
        assert hits[0] == line["rank"]


def test_a_checkpoint_with_nan_is_told_as_such(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_checkpoint(finished / "best.pt")
    content["model"]["encoder.text.projection.weight"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(SystemExit):
        run_test_program(monkeypatch, "--run", finished, "--checkpoint", tmp_path / "nan.pt")
    assert "encoder.text.projection.weight (NaN or infinite)" in capsys.readouterr().err


def test_the_val_split_can_be_tested_too(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run_test_program(monkeypatch, "--run", finished, "--split", "val")
    expected = load_checkpoint(finished / "best.pt")["metrics"]["val"]
    assert f"{expected['R1']:.2f}" in capsys.readouterr().out
