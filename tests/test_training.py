"""From YAML to metrics on rendered pedestrians: what a run writes, and that test.py gives its numbers again."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import test as test_program
import train as train_program
from configs.schema import Config, DataConfig, load_config
from datasets.annotations import load_annotations
from datasets.loaders import build_eval_loaders, data_tokenizer
from datasets.pairs import TrainPairs
from model.build import build_encoder, resolve
from model.objectives.matching import SDM
from processor.evaluator import METRICS, embed
from processor.meters import Meters, StepWatch
from processor.reporting import result_table
from processor.trainer import Trainer
from solver.schedule import lr_at
from tests.conftest import ROOT, TINY
from utils.checkpoint import load_checkpoint
from utils.errors import ConfigError, DataError, TrainingError

IRRA = ROOT / "configs/irra.yaml"


def tiny_config(tiny: list[str], *overrides: str, config: Path = IRRA) -> Config:
    return resolve(load_config(config, [*tiny, *overrides]))


def metrics_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six epochs that learns its eight training people by heart."""
    run = tmp_path_factory.mktemp("finished") / "run"
    overrides = [
        "train.epochs=6",
        "solver.lr=5e-4",
        "solver.eps=1e-8",
        "solver.schedule.warmup_epochs=1",
        "eval.every=2",
    ]
    config = tiny_config([*TINY, f"data.root={root}"], *overrides)
    return train_program.train(config, run)


def test_a_run_folder_holds_everything(finished: Path) -> None:
    names = {path.name.split(".")[0] if path.name.startswith("events") else path.name for path in finished.iterdir()}
    assert names == {"config.yaml", "train.log", "metrics.jsonl", "best.pt", "last.pt", "events"}
    assert resolve(load_config(finished / "config.yaml")).train.epochs == 6
    last, best = load_checkpoint(finished / "last.pt"), load_checkpoint(finished / "best.pt")
    assert last["epoch"] == 6 and {"model", "training", "config", "metrics"} <= set(last)
    lines = metrics_lines(finished)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines if "val" in line] == [2, 4, 6]
    first_best = max((line for line in lines if "val" in line), key=lambda line: line["val"]["R1"])
    assert best["epoch"] == first_best["epoch"] and best["metrics"]["val"] == first_best["val"]


def test_the_losses_fall(finished: Path) -> None:
    lines = metrics_lines(finished)
    for name in ("loss", "sdm_loss", "id_loss", "mlm_loss"):
        assert lines[-1][name] < lines[0][name]
    assert lines[0]["lr"] == pytest.approx(5e-5) and lines[1]["lr"] == pytest.approx(5e-4)
    assert all(line["samples_per_second"] > 0 and line["peak_memory_gib"] > 0 for line in lines)


def test_each_parameter_group_has_the_scheduled_rate_of_its_own_base(finished: Path) -> None:
    config, last = load_config(finished / "config.yaml"), load_checkpoint(finished / "last.pt")
    groups = last["training"]["optimizer"]["param_groups"]
    assert {round(group["base_lr"] / 5e-4) for group in groups} == {1, 2, 5}
    for group in groups:
        expected = lr_at(6, group["base_lr"], epochs=6, **asdict(config.solver.schedule))
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
    log, lines = (finished / "train.log").read_text(), [line for line in metrics_lines(finished) if "test" in line]
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
        [line["loss"] for line in metrics_lines(finished)]
    )


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
    evaluate = test_program.evaluate
    monkeypatch.setattr(test_program, "evaluate", lambda arguments: results.update(evaluate(arguments)))
    dump = tmp_path / "ranks.jsonl"
    name = file if checkpoint == "path" else checkpoint
    run_test_program(monkeypatch, "--run", finished, "--checkpoint", name, "--i2t", "--dump", dump)
    assert results["t2i"] == recorded["test"]  # to the last bit
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
    assert "error: the embeddings are not finite" in capsys.readouterr().err


def test_the_val_split_can_be_tested_too(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run_test_program(monkeypatch, "--run", finished, "--split", "val")
    expected = load_checkpoint(finished / "best.pt")["metrics"]["val"]
    assert f"{expected['R1']:.2f}" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny: list[str], tmp_path: Path) -> None:
    def weights(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        run = train_program.train(tiny_config(tiny, *overrides), tmp_path / name)
        return load_checkpoint(run / "last.pt")["model"]

    first, again, other = weights("a"), weights("b"), weights("c", "train.seed=2")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16"],
        ["train.precision=fp16"],
        ["train.clip_grad=0.5", "train.accumulate=3"],
        ["solver.optimizer=sgd", "eval.select_on=test"],
        ["losses.sdm=null", "losses.cmpm={}", "losses.mlm.clean_captions=true"],
    ],
    ids=" ".join,
)
def test_options_of_the_loop_train(overrides: list[str], tiny: list[str], tmp_path: Path) -> None:
    run = train_program.train(tiny_config(tiny, *overrides), tmp_path / "run")
    (line,) = metrics_lines(run)
    assert line["loss"] > 0 and set(METRICS) == set(line["test"])


def test_compile_compiles_both_towers_and_trains(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    compiled = []

    def compile_without_code_generation(self: torch.nn.Module) -> None:  # which takes a minute and is not ours
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code_generation)
    run = train_program.train(tiny_config(tiny, "train.compile=true", "train.ema=0.5"), tmp_path / "run")
    assert compiled == ["ImageTower", "TextTower"]
    plain = train_program.train(tiny_config(tiny), tmp_path / "plain")
    assert load_checkpoint(run / "last.pt")["model"].keys() == load_checkpoint(plain / "last.pt")["model"].keys()
    assert metrics_lines(run)[0]["loss"] == pytest.approx(metrics_lines(plain)[0]["loss"], rel=1e-4)


def test_gradients_are_clipped_to_the_norm(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def record(self, *args, **kwargs) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    train_program.train(tiny_config(tiny, "solver.optimizer=sgd", "train.clip_grad=0.25"), tmp_path / "run")
    assert len(norms) == 4 and norms == pytest.approx([0.25] * 4, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_images(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = SDM.forward, []

    def sometimes_nan(self, step):
        calls.append(1)
        loss, values = forward(self, step)
        return (loss * float("nan") if len(calls) == 7 else loss), values  # step 3 of epoch 2

    monkeypatch.setattr(SDM, "forward", sometimes_nan)
    with pytest.raises(TrainingError) as caught:
        train_program.train(tiny_config(tiny, "train.epochs=3"), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 7: the loss is not finite (loss = nan, sdm_loss = nan, id_loss = ")
    assert message.count(".jpg") >= 4
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1  # of the epoch before
    assert len(metrics_lines(tmp_path / "run")) == 1


def test_no_step_reads_a_number_from_the_device(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host read in the step would make every GPU step wait; only log lines may read."""
    inside = {"step": False}
    forward = train_program.build_task.__globals__["RetrievalTask"].forward

    def watched(self, batch):
        inside["step"] = True
        try:
            return forward(self, batch)
        finally:
            inside["step"] = False

    def forbid(name: str):
        original = getattr(torch.Tensor, name)

        def guarded(self, *args, **kwargs):
            assert not inside["step"], f"Tensor.{name} in the step"
            return original(self, *args, **kwargs)

        return guarded

    monkeypatch.setattr("model.task.RetrievalTask.forward", watched)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, forbid(name))
    reads = []
    monkeypatch.setattr(Meters, "read", lambda self, read=Meters.read: reads.append(1) or read(self))
    train_program.train(tiny_config(tiny, "train.log_every=3"), tmp_path / "run")
    assert len(reads) == 3  # two log lines (step 3 and the last), one record


@pytest.mark.parametrize(
    "split, expected", [("val", ["best", "last", "best", "last", "last"]), ("test", ["best", "last", "last", "last"])]
)
def test_best_is_what_the_chosen_split_says(
    split: str, expected: list[str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    monkeypatch.setattr("processor.trainer.save_checkpoint", lambda path, content: saved.append(path.stem))
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    config = tiny_config(tiny, f"eval.select_on={split}")
    trainer = Trainer(module, optimizer, None, {}, config, tmp_path, torch.device("cpu"))  # type: ignore[arg-type]
    monkeypatch.setattr(trainer, "state_dict", dict)
    numbers = dict.fromkeys(METRICS, 1.0)
    for epoch, val, test in [(1, 10.0, 30.0), (2, 20.0, 25.0), (3, 20.0, 30.0)]:  # a draw goes to the first
        record = {"epoch": epoch, "val": {**numbers, "R1": val}, "test": {**numbers, "R1": test}}
        trainer.history.append(record)
        trainer._save()
    assert saved == expected
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]]
        for line in result_table(trainer.history, split).splitlines()
        if "|" in line
    ]
    mark = {"val": [" (best.pt)", ""], "test": ["", " (best.pt)"]}[split]
    assert rows[1:] == [
        ["selected on val" + mark[0], "2", "25.00"],
        ["last epoch", "3", "30.00"],
        ["best on test" + mark[1], "1", "30.00"],
    ]


def test_embeddings_are_unit_vectors_in_annotation_order_and_the_mode_is_put_back(root: Path, tiny: list[str]) -> None:
    config = tiny_config(tiny)
    annotations = load_annotations("synthetic", root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=10**6)
    loaders = build_eval_loaders(config.data, annotations.test, tokenizer, batch_size=5, pin_memory=False)
    encoder = build_encoder(config).train()
    found = embed(encoder, loaders, torch.device("cpu"), "fp32")
    assert encoder.training
    for vectors, count in ((found.gallery, 8), (found.query, 16)):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count))
    assert found.gallery_pids.tolist() == [record.pid for record in annotations.test]


def test_meters_average_over_pairs_not_batches() -> None:
    meters = Meters()
    meters.update({"loss": torch.tensor(1.0)}, 3)
    meters.update({"loss": torch.tensor(5.0)}, 1)
    assert meters.read() == {"loss": 2.0}


def test_the_watch_names_the_first_bad_step(root: Path) -> None:
    annotations = load_annotations("synthetic", root)
    pairs = TrainPairs(annotations.train, annotations.train_labels, None, None, (), 0, DataConfig())  # type: ignore[arg-type]
    watch = StepWatch(pairs)
    watch.note(1, {"loss": torch.tensor(1.0)}, torch.tensor([0]))
    watch.check()
    watch.note(2, {"loss": torch.tensor(float("inf"))}, torch.tensor([5]))
    watch.note(3, {"loss": torch.tensor(float("nan"))}, torch.tensor([7]))
    with pytest.raises(TrainingError, match=rf"(?s)step 2: .*{re.escape(pairs.pairs[5].record.image_path)}"):
        watch.check()


def test_selecting_on_a_val_split_that_is_not_there_is_an_error(
    tiny: list[str], root: Path, monkeypatch, tmp_path
) -> None:
    annotations = load_annotations("synthetic", root)
    annotations.val.clear()
    monkeypatch.setattr(train_program, "load_annotations", lambda *args, **options: annotations)
    with pytest.raises(DataError, match=r"has no val split to select on; data\.val_ids=200.*eval\.select_on=test"):
        train_program.train(tiny_config(tiny), tmp_path / "run")
    run = train_program.train(tiny_config(tiny, "eval.select_on=test"), tmp_path / "run")
    assert "best on test (best.pt)" in (run / "train.log").read_text()


def test_a_vocabulary_larger_than_the_text_towers_is_an_error(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: has \d+ tokens, but the text tower has 520"):
        train_program.train(tiny_config(tiny, "model.text.options.vocab_size=520"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_left_alone(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"run: this run folder is there already"):
        train_program.train(tiny_config(tiny), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
