"""IRRA against its authors' code: features, losses, gradients, four Adam steps, parameter settings."""

import json

import numpy as np
import pytest
import torch

from configs.schema import load_config
from datasets.collate import Collate
from model.build import build_task
from model.checkpoints.formats import IRRA_RULES, irra, renamed
from model.objectives.masked_language import MaskedLanguage
from model.task import RetrievalTask
from solver.optimizer import build_optimizer, parameter_settings, set_lr
from tests.helpers.configs import GOLDEN
from tests.helpers.golden import (
    RECIPE,
    close,
    features_are_the_authors,
    golden_batch,
    golden_overrides,
    golden_task,
    gradients_are_the_authors,
)


@pytest.fixture
def task(model_golden: dict[str, np.ndarray]) -> RetrievalTask:
    return golden_task(model_golden)


def test_both_towers_give_the_authors_features(task: RetrievalTask, model_golden: dict[str, np.ndarray]) -> None:
    features_are_the_authors(task, model_golden)
    batch = golden_batch(model_golden)
    close(task.encode_text(batch["mlm_ids"]).tokens, model_golden["out/mlm_feats"])


def test_heads_give_the_authors_scores(task: RetrievalTask, model_golden: dict[str, np.ndarray]) -> None:
    step = task.gathered_step(golden_batch(model_golden))
    mlm, identity = task.objectives["mlm"], task.objectives["id"]
    assert isinstance(mlm, MaskedLanguage)
    hidden = mlm.fuse(step.texts["mlm_ids"], step.image_tokens)
    close(hidden, model_golden["out/cross_former"])
    close(mlm.mlm_head(hidden), model_golden["out/mlm_scores"], 2e-5)
    close(identity.classifier(step.image), model_golden["out/img_logits"])
    close(identity.classifier(step.text), model_golden["out/txt_logits"])


def test_a_batch_of_short_captions_keeps_the_padding_that_the_heads_attend_to(
    task: RetrievalTask, model_golden: dict[str, np.ndarray]
) -> None:
    whole = golden_batch(model_golden)
    short = range(1, len(whole["pids"]))  # row 0 fills the context
    items = [{name: value[i : i + 1] for name, value in whole.items() if name != "mlm_positions"} for i in short]
    step = task.gathered_step(Collate(full_text=task.full_text)(items))
    mlm = task.objectives["mlm"]
    assert isinstance(mlm, MaskedLanguage)
    scores = mlm.mlm_head(mlm.fuse(step.texts["mlm_ids"], step.image_tokens))
    close(scores, model_golden["out/mlm_scores"][1:], 2e-5)


@pytest.mark.parametrize("loss", ["sdm", "itc", "cmpm"])
def test_each_global_loss_is_the_authors(loss: str, model_golden: dict[str, np.ndarray]) -> None:
    task = golden_task(model_golden, *(() if loss == "sdm" else ("losses.sdm=null", f"losses.{loss}={{}}")))
    _, terms = task(golden_batch(model_golden))
    np.testing.assert_allclose(float(terms[f"{loss}_loss"]), model_golden[f"irra/{loss}_loss"], rtol=2e-5)


def test_losses_accuracies_and_gradients_are_the_authors(
    task: RetrievalTask, model_golden: dict[str, np.ndarray]
) -> None:
    size = json.loads(str(model_golden["cfg_json"]))
    total, terms = task(golden_batch(model_golden))
    weights = {"id_loss": size["id_w"], "mlm_loss": size["mlm_w"]}  # stored with the loss weight applied
    for name in ("sdm_loss", "id_loss", "mlm_loss", "img_acc", "txt_acc", "mlm_acc"):
        np.testing.assert_allclose(float(terms[name]) * weights.get(name, 1), model_golden[f"irra/{name}"], rtol=2e-5)
    total.backward()
    assert gradients_are_the_authors(task, model_golden, "irra") == 8


def test_four_adam_steps_follow_the_authors(task: RetrievalTask, model_golden: dict[str, np.ndarray]) -> None:
    config = load_config(RECIPE, golden_overrides(model_golden))
    optimizer = build_optimizer(config.solver, task.named_parameters())
    set_lr(optimizer, float)
    batch = golden_batch(model_golden)
    for expected in model_golden["irra/trajectory"]:
        total, terms = task(batch)
        actual = [float(total.detach()), *(float(terms[f"{name}_loss"]) for name in ("sdm", "id", "mlm"))]
        np.testing.assert_allclose(actual, expected, rtol=1e-3)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    names = [name.split("/", 1)[1] for name in model_golden if name.startswith("irra_after4/")]
    assert len(names) == 6
    after = irra({name: torch.from_numpy(model_golden[f"irra_after4/{name}"]) for name in names})
    for name, expected in after.items():
        np.testing.assert_allclose(
            task.state_dict()[name].numpy(), expected.numpy(), rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_full_size_parameters_have_the_authors_settings() -> None:
    reference = json.loads((GOLDEN / "irra_vitb16_state_dict.json").read_text())
    config = load_config(RECIPE, ["model.image.pretrained=false", "model.text.pretrained=false"])
    with torch.device("meta"):
        task = build_task(config, num_pids=reference["num_classes"])
    ours = dict(task.named_parameters())
    assert sum(parameter.numel() for parameter in ours.values()) == reference["total_params"]
    placed = set()
    for name, settings in reference["optimizer_groups"].items():
        for own in renamed(name, IRRA_RULES):
            assert parameter_settings(own, config.solver.rules, config.solver.weight_decay) == (
                settings["lr_mult"],
                settings["weight_decay"],
            ), own
            placed.add(own)
    assert len(reference["optimizer_groups"]) == 367
    assert placed == set(ours)
    optimizer = build_optimizer(config.solver, ours.items())
    assert len(optimizer.param_groups) == 4
