"""FMFA and IVT with their options: every option reaches its loss, every variant trains."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import load_config
from processor import training
from processor.resolve import resolve
from tests.helpers.configs import ROOT, TINY_IVT
from tests.helpers.programs import evaluate
from tests.helpers.tasks import tiny_batch, tiny_task
from utils.errors import ConfigError

# --- FMFA -------------------------------------------------------------------------------------------------------------


FMFA = ROOT / "configs/fmfa.yaml"


@pytest.mark.parametrize(
    "option",
    [
        *("asdm.detach=true", "asdm.eps=0.1", "asdm.alpha=3", "asdm.gap=prob", "asdm.positive=pair"),
        *("efa.margin_text=1", "efa.margin_image=1", "efa.temperature=1", "efa.sigma=3", "efa.variant=paper"),
    ],
)
def test_each_option_reaches_its_loss(option: str) -> None:
    loss, gradients = option.partition(".")[0], []
    others = [f"losses.{name}=null" for name in ("asdm", "efa", "id", "mlm") if name != loss]
    for overrides in (others, [*others, f"losses.{option}"]):
        task = tiny_task(*overrides, config=FMFA)
        task(tiny_batch(task))[0].backward()
        gradients.append(task.encoder.image.projection.weight.grad)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize(
    "overrides, losses",
    [
        (["losses.asdm=null", "losses.efa=null", "losses.sdm={}"], {"sdm", "id", "mlm"}),
        (["losses.efa=null"], {"asdm", "id", "mlm"}),
        (["losses.asdm=null", "losses.sdm={}"], {"sdm", "efa", "id", "mlm"}),
        ([], {"asdm", "efa", "id", "mlm"}),
        (
            ["losses.efa.variant=paper", "losses.asdm.gap=prob", "losses.asdm.positive=pair"],
            {"asdm", "efa", "id", "mlm"},
        ),
        (["losses.asdm.alpha=[10, 1]", "losses.asdm.detach=true"], {"asdm", "efa", "id", "mlm"}),
    ],
)
def test_each_ablation_trains_a_step(overrides: list[str], losses: set[str]) -> None:
    task = tiny_task(*overrides, config=FMFA)
    assert {name for name, _ in task.named_objectives()} == losses
    total, terms = task(tiny_batch(task))
    total.backward()
    assert total.isfinite() and {f"{name}_loss" for name in losses} <= terms.keys()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.encoder.image.parameters())


def test_a_batch_of_one_pair_and_a_masked_away_caption_are_finite() -> None:
    for overrides in ([], ["losses.efa.variant=paper"], ["losses.efa.mask_padding=true"]):
        task = tiny_task(*overrides, config=FMFA)
        batch = tiny_batch(task, size=1)
        batch["mlm_ids"][0, 2:] = 0
        total, _ = task(batch)
        total.backward()
        assert total.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


MISTAKES = {
    "losses.asdm.alpha=ten": r"losses\.asdm\.alpha: must be a number .* got 'ten'",
    "losses.asdm.alpha=-1": r"losses\.asdm\.alpha: must be at least 0",
    "losses.asdm.alpha=[1, 2, 3]": r"losses\.asdm\.alpha: must be a number or a list of 2 numbers, got \[1, 2, 3\]",
    "losses.asdm.alpha=true": r"losses\.asdm\.alpha: ",
    "losses.asdm.alpha=.nan": r"losses\.asdm\.alpha: ",
    "losses.asdm.alpha=null": r"losses\.asdm\.alpha: ",
    "losses.asdm.gap=cos": r"losses\.asdm\.gap: .*cos",
    "losses.asdm.positive=any": r"losses\.asdm\.positive: .*any",
    "losses.efa.variant=v1": r"losses\.efa\.variant: .*v1",
    "losses.efa.margin=1": r"losses\.efa\.margin: unknown key",
    "losses.efa.temperature=0": r"losses\.efa\.temperature: must be above 0, got 0",
    "losses.efa.sigma=-1": r"losses\.efa\.sigma: must be at least 0",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_name_their_path(override: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        tiny_task(override, config=FMFA)


# --- IVT --------------------------------------------------------------------------------------------------------------


IVT = ROOT / "configs/ivt.yaml"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.views=1", "data.text_levels=[sentence]"],
        ["model.mask_ratio=0"],
        ["losses.cmpm=null", "losses.sdm={}"],
        ["losses.cmpm.target_norm=sum", "losses.id={}"],
        ["data.sampler=random", "model.mask_per_sample=true"],
        ["losses.cmpm=null", "losses.mlm={depth: 1}", "model.mask_ratio=0"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_ivt_trains_and_is_tested_like_any_other(overrides: list[str], root: Path, tmp_path: Path) -> None:
    config = resolve(load_config(IVT, [*TINY_IVT, f"data.root={root}", *overrides]))
    run = training.train(config, tmp_path / "run")
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(record["loss"]) and set(record["test"]) == {"R1", "R5", "R10", "mAP", "mINP"}
    rows = evaluate("--run", run, "--on", "synthetic", "--i2t")
    assert rows["t2i synthetic"] == record["test"]
