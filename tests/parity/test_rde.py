"""RDE against its authors' code: per-pair losses, recalibrated losses, parameter groups and schedule."""

import numpy as np
import pytest
import torch

from configs.schema import load_config
from model.build import build_task
from model.objectives import OBJECTIVES, PairObjective
from solver.optimizer import build_optimizer
from solver.schedule import lr_at
from tests.helpers.configs import ROOT, TINY
from tests.helpers.golden import golden_case, leaf
from tests.helpers.objectives import METADATA, objective_step

NAMES = {"TAL": "tal", "TRL": "trl", "InfoNCE": "itc", "SDM": "sdm"}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_case("rde_public.npz")


def objective_of(name: str, golden: dict[str, np.ndarray], **options) -> PairObjective:
    if name in ("tal", "trl"):
        options |= {"tau": float(golden["loss/tau"]), "margin": float(golden["loss/margin"])}
    built = OBJECTIVES.get(name, "")(METADATA, **options)
    assert isinstance(built, PairObjective)
    return built


@pytest.mark.parametrize("theirs", NAMES)
def test_losses_of_each_pair_are_the_authors(theirs: str, golden: dict[str, np.ndarray]) -> None:
    objective = objective_of(NAMES[theirs], golden)
    image, text = leaf(golden["loss/image_feats"]), leaf(golden["loss/text_feats"])
    step = objective_step((image, text), pids=torch.from_numpy(golden["loss/pid"]))
    assert float(golden["loss/logit_scale"]) == step.logit_scale
    losses = objective.pair_losses(step)[0]
    losses.sum().backward()
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if theirs == "SDM" else {"rtol": 1e-9, "atol": 1e-12}  # theirs is fp32
    for actual, name in ((losses.detach(), "per_sample"), (image.grad, "grad_image_of_sum")):
        np.testing.assert_allclose(actual.numpy(), golden[f"loss/{theirs}/{name}"], **tolerance)  # type: ignore[union-attr]
    np.testing.assert_allclose(text.grad.numpy(), golden[f"loss/{theirs}/grad_text_of_sum"], **tolerance)  # type: ignore[union-attr]


@pytest.mark.parametrize("theirs", NAMES)
def test_recalibrated_losses_of_two_embeddings_are_the_authors(theirs: str, golden: dict[str, np.ndarray]) -> None:
    objective = objective_of(NAMES[theirs], golden)
    names = ("image", "text", "image_tse", "text_tse")
    leaves = [
        leaf(golden[f"loss/{name.replace('image', 'image_feats').replace('text', 'text_feats')}"]) for name in names
    ]
    pids, labels = torch.from_numpy(golden["loss/pid"]), torch.from_numpy(golden["loss/label_hat"])
    objective.clean_mask = torch.zeros(20, dtype=torch.bool)
    places = torch.tensor([3, 17, 0, 8, 5, 11, 19, 2])
    objective.clean_mask[places] = labels.bool()
    step = objective_step((leaves[0], leaves[1]), (leaves[2], leaves[3]), pids=pids, index=places)
    loss, _ = objective(step)
    loss.backward()
    expected = golden[f"loss/{theirs}/rbs_bge"] + golden[f"loss/{theirs}/rbs_tse"]
    np.testing.assert_allclose(float(loss.detach()), expected, rtol=1e-7)
    for name, tensor in zip(names, leaves, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad, golden[f"loss/{theirs}/rbs_grad_{name}"], rtol=1e-6, atol=1e-7)


def test_the_groups_of_rde_are_the_authors() -> None:
    """CLIP at 1e-5, its biases at 2e-5 without decay; token selection at 1e-3, with decay on weights only."""
    config = load_config(ROOT / "configs/rde.yaml", TINY)
    task = build_task(config, num_pids=4)
    groups = build_optimizer(config.solver, task.named_parameters()).param_groups
    settings = {(round(group["base_lr"], 9), group["weight_decay"]): group["params"] for group in groups}
    assert set(settings) == {(1e-5, 4e-5), (2e-5, 0), (1e-3, 4e-5), (1e-3, 0)}
    places = {id(parameter): setting for setting, parameters in settings.items() for parameter in parameters}
    for name, parameter in task.named_parameters():
        selection, bias = name.startswith("encoder.selection."), name.endswith("bias")
        expected = (1e-3 if selection else 2e-5 if bias else 1e-5, 0 if bias else 4e-5)
        assert places[id(parameter)] == expected, name
    solver = config.solver
    assert (solver.optimizer, solver.eps, tuple(solver.betas)) == ("adam", 1e-3, (0.9, 0.999))
    schedule = {**solver.schedule, "epochs": load_config(ROOT / "configs/rde.yaml").train.epochs}
    factors = [lr_at(epoch, 1.0, **schedule) for epoch in (1, 2, 3, 4, 5, 6, 60)]
    np.testing.assert_allclose(factors, [0.1, 0.28, 0.46, 0.64, 0.82, 1.0, 0.000815], rtol=1e-3)
