"""The training loop: determinism, options, clipping, NaN check, device syncs, best epoch, moving average."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import test as test_program
from configs.schema import load_config
from model.build import build_task
from model.encoders import Encoded
from model.encoders.clip import CLIPEncoder
from model.load import load_init
from model.objectives.matching import SDM
from model.task import RetrievalTask
from processor import training
from processor.engine import Engine
from processor.evaluator import METRICS
from processor.meters import Meters
from processor.reporting import result_table
from processor.resolve import resolve
from processor.trainer import Trainer
from tests.helpers.configs import ROOT, TINY_IVT, config_of, irra_config
from tests.helpers.programs import run_program
from tests.helpers.runs import lines_of
from utils.checkpoint import load_checkpoint
from utils.errors import TrainingError

IVT = ROOT / "configs/ivt.yaml"


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny: list[str], tmp_path: Path) -> None:
    def weights(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        run = training.train(irra_config(tiny, *overrides), tmp_path / name)
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
    run = training.train(irra_config(tiny, *overrides), tmp_path / "run")
    (line,) = lines_of(run)
    assert line["loss"] > 0 and set(METRICS) == set(line["test"])


def test_products_have_the_precision_of_the_config_in_steps_only(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    encode = CLIPEncoder.encode_text

    def note(self: CLIPEncoder, caption_ids: Tensor) -> Encoded:
        seen.add((self.training, torch.get_float32_matmul_precision()))
        return encode(self, caption_ids)

    monkeypatch.setattr(CLIPEncoder, "encode_text", note)
    training.train(irra_config(tiny, "train.matmul=medium", "train.precision=fp32"), tmp_path / "run")
    assert seen == {(True, "medium"), (False, "highest")}


def test_compile_compiles_both_towers_and_trains(tiny: list[str], tmp_path: Path, monkeypatch) -> None:
    compiled = []

    def compile_without_code_generation(self: torch.nn.Module) -> None:  # generation takes a minute
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code_generation)
    run = training.train(irra_config(tiny, "train.compile=true", "train.ema=0.5"), tmp_path / "run")
    assert compiled == ["ImageTower", "TextTower"]
    plain = training.train(irra_config(tiny), tmp_path / "plain")
    assert load_checkpoint(run / "last.pt")["model"].keys() == load_checkpoint(plain / "last.pt")["model"].keys()
    assert lines_of(run)[0]["loss"] == pytest.approx(lines_of(plain)[0]["loss"], rel=1e-4)


def test_gradients_are_clipped_to_the_norm(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def record(self, *args, **kwargs) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    training.train(irra_config(tiny, "solver.optimizer=sgd", "train.clip_grad=0.25"), tmp_path / "run")
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
        training.train(irra_config(tiny, "train.epochs=3"), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 7: the loss is not finite (loss = nan, sdm_loss = nan, id_loss = ")
    assert message.count(".jpg") >= 4
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1  # from the epoch before
    assert len(lines_of(tmp_path / "run")) == 1


def test_no_step_reads_a_number_from_the_device(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbid host reads within a step, which would stall a GPU; only log lines may read."""
    inside = {"step": False}
    forward = training.build_task.__globals__["RetrievalTask"].forward

    def watched(self, *batch):
        inside["step"] = True
        try:
            return forward(self, *batch)
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
    training.train(irra_config(tiny, "train.log_every=3"), tmp_path / "run")
    assert len(reads) == 3  # two log lines (step 3 and the last), one record


@pytest.mark.parametrize(
    "split, expected", [("val", ["best", "last", "best", "last", "last"]), ("test", ["best", "last", "last", "last"])]
)
def test_best_is_what_the_chosen_split_says(
    split: str, expected: list[str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    monkeypatch.setattr("processor.saving.save_checkpoint", lambda path, content: saved.append(path.stem))
    config = irra_config(tiny, f"eval.select_on={split}")
    engine = Engine(torch.nn.Linear(1, 1), config, torch.device("cpu"))  # type: ignore[arg-type]
    trainer = Trainer(engine, None, {}, tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(trainer, "state_dict", dict)
    numbers = dict.fromkeys(METRICS, 1.0)
    for epoch, val, test in [(1, 10.0, 30.0), (2, 20.0, 25.0), (3, 20.0, 30.0)]:  # the first of equal epochs wins
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


def test_the_log_counts_pairs_and_not_views(root: Path, tmp_path: Path) -> None:
    config = resolve(load_config(IVT, [*TINY_IVT, f"data.root={root}"]))
    loader_pairs = 8 * 2 * 2
    run = training.train(config, tmp_path / "run")
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["samples_per_second"] * record["seconds"] == pytest.approx(loader_pairs, abs=8)


# --- exponential moving average of the weights ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """Run with EMA, and the encoder's weights after each of its steps."""
    run, weights = tmp_path_factory.mktemp("average") / "run", []
    update = Engine.update

    def recorded(self: Engine) -> None:
        update(self)
        weights.append({name: value.clone() for name, value in self.task.encoder.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "update", recorded)
        more = ["train.ema=0.8", "train.epochs=3", "solver.lr=1e-3", "solver.eps=1e-6"]
        training.train(config_of("irra", root, *more), run)
    return run, weights


def test_it_is_the_exponential_moving_average(history: tuple[Path, list[dict[str, Tensor]]]) -> None:
    run, weights = history
    found = load_checkpoint(run / "last.pt")["training"]["average"]
    assert len(weights) == 12
    for name in weights[0]:
        expected = weights[0][name].clone()
        for step in weights[1:]:
            expected = 0.8 * expected + 0.2 * step[name] if expected.is_floating_point() else step[name]
        torch.testing.assert_close(found[f"module.{name}"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["module.text.projection.weight"], weights[-1]["text.projection.weight"])


def test_it_is_evaluated_and_saved_beside(history, monkeypatch, capsys, root: Path) -> None:
    run, _ = history
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["val_ema"]["R1"])
    content = load_checkpoint(run / "best_ema.pt")
    assert content["epoch"] == best["epoch"] and all(name.startswith("encoder.") for name in content["model"])
    status, out, err = run_program(test_program.main, monkeypatch, capsys, "--run", run, "--checkpoint", "best_ema")
    assert status == 0, err
    for metric in ("R1", "mAP", "mINP"):
        assert f"{best['test_ema'][metric]:.2f}" in out
    assert [line["test"] for line in lines] != [line["test_ema"] for line in lines]
    log = (run / "train.log").read_text()
    assert "selected on val, averaged weights (best_ema.pt)" in log and "t2i test_ema" in log


def test_training_does_not_see_it(history, root: Path, tmp_path: Path) -> None:
    _, weights = history
    plain = config_of("irra", root, "train.epochs=3", "solver.lr=1e-3", "solver.eps=1e-6")
    training.train(plain, tmp_path / "plain")
    for name, value in load_checkpoint(tmp_path / "plain/last.pt")["model"].items():
        if name.startswith("encoder."):
            assert torch.equal(value, weights[-1][name.removeprefix("encoder.")])
    assert not (tmp_path / "plain/best_ema.pt").exists()


def test_a_run_can_start_from_it(history, root: Path) -> None:
    run, _ = history
    config = config_of("irra", root, f"init.path={run / 'best_ema.pt'}")
    task = build_task(config, 8)
    report = load_init(task, config.init)
    assert report is not None and isinstance(task, RetrievalTask)
    mean = load_checkpoint(run / "best_ema.pt")["model"]
    assert torch.equal(task.state_dict()["encoder.text.projection.weight"], mean["encoder.text.projection.weight"])
