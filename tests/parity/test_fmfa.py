"""FMFA against its authors' code: losses and gradients of the shipped configs, published settings, parameters."""

import numpy as np
import pytest

from configs.schema import load_config
from model.build import build_task
from processor.resolve import resolve
from tests.helpers.configs import ROOT, TINY
from tests.helpers.golden import golden_batch, golden_task, gradients_are_the_authors

FMFA = ROOT / "configs/fmfa.yaml"
PUBLISHED = {
    "fmfa_v1": ("fmfa.yaml", "a_sdm"),
    "fmfa_v1_rstp": ("fmfa_rstpreid.yaml", "a_sdm"),
    "fmfa_head": ("fmfa_finetune.yaml", "a-sdm"),
}


@pytest.mark.parametrize("version", PUBLISHED)
def test_shipped_configs_give_the_authors_losses_and_gradients(
    version: str, model_golden: dict[str, np.ndarray]
) -> None:
    config, asdm = PUBLISHED[version]
    task = golden_task(model_golden, recipe=ROOT / "configs" / config)
    total, terms = task(golden_batch(model_golden))
    names = {asdm: "asdm", "efa": "efa", "id": "id", "mlm": "mlm"}
    expected = {names[n]: model_golden[f"{version}/{n}_loss"] for n in names if f"{version}/{n}_loss" in model_golden}
    assert {"asdm", "efa"} <= expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(float(terms[f"{name}_loss"]), value, rtol=2e-5)
    if f"{version}/total" in model_golden:
        np.testing.assert_allclose(float(total.detach()), model_golden[f"{version}/total"], rtol=2e-5)
        total.backward()
        assert gradients_are_the_authors(task, model_golden, version) == 3


def test_the_losses_defaults_are_the_first_commits() -> None:
    bare = resolve(load_config(ROOT / "configs/irra.yaml", ["losses.sdm=null", "losses.asdm={}", "losses.efa={}"]))
    assert bare.losses == resolve(load_config(FMFA)).losses


def test_the_published_settings() -> None:
    v1, icfg, rstp, head = (
        load_config(ROOT / "configs" / f"fmfa{name}.yaml") for name in ("", "_icfg", "_rstpreid", "_finetune")
    )
    assert [config.data.dataset for config in (v1, icfg, rstp)] == ["cuhk_pedes", "icfg_pedes", "rstpreid"]
    assert [config.train.epochs for config in (v1, icfg, rstp, head)] == [60, 100, 60, 60]
    assert [config.solver.lr for config in (v1, icfg, rstp, head)] == [1e-5, 1e-5, 1e-5, 5e-6]
    assert [config.data.batch_size for config in (v1, icfg, rstp, head)] == [64, 64, 64, 128]
    assert [config.losses["asdm"]["alpha"] for config in (v1, icfg, rstp, head)] == [10, 10, 1, 0.1]
    margins = [
        tuple(config.losses["efa"][f"margin_{m}"] for m in ("text", "image")) for config in (v1, icfg, rstp, head)
    ]
    assert margins == [(0.1, 0.1), (0.2, 1.0), (0.2, 0.8), (0.1, 0.9)]
    assert v1.solver.rules and not head.solver.rules


def test_training_costs_no_parameter_and_inference_is_irras() -> None:
    sizes = [
        {name: tuple(p.shape) for name, p in build_task(load_config(path, TINY), 5, weights=False).named_parameters()}
        for path in (ROOT / "configs/irra.yaml", FMFA)
    ]
    assert sizes[0] == sizes[1]
