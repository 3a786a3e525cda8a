"""The whole IRRA model against its authors' code: features, losses, gradients, four Adam steps, parameter settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import load_config
from datasets.collate import Collate
from model.build import build_task
from model.checkpoints.formats import IRRA_RULES, irra, renamed
from model.encoders.towers import resize_position_grid
from model.load import LoadReport, load_converted, load_weights
from model.objectives.masked_language import MaskedLanguage
from model.task import RetrievalTask
from solver.optimizer import build_optimizer, parameter_settings, set_lr
from tests.conftest import ARCH, GOLDEN
from utils.batch import Batch
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError

# The golden trajectory's optimizer: base lr 1e-4, otherwise the recipe's.
RECIPE = "configs/irra.yaml"


def golden_overrides(golden: dict[str, np.ndarray]) -> list[str]:
    """The size of the golden model, as overrides of the shipped recipe."""
    size = json.loads(str(golden["cfg_json"]))
    image = (
        f"{{embed_dim: {size['vwidth']}, depth: {size['vlayers']}, "
        f"num_heads: {size['vwidth'] // 64}, patch_size: {size['patch']}}}"
    )
    text = (
        f"{{hidden_size: {size['twidth']}, num_hidden_layers: {size['tlayers']}, vocab_size: {size['vocab']}, "
        f"num_attention_heads: {size['twidth'] // 64}, intermediate_size: {4 * size['twidth']}, "
        f"max_position_embeddings: {size['ctx']}}}"
    )
    return [
        f"data.image_size={size['img']}",
        f"data.text_length={size['ctx']}",
        f"model.embed_dim={size['embed_dim']}",
        f"model.temperature={size['temp']}",
        f"model.image={{arch: {ARCH}, stride: {size['stride']}, pretrained: false, options: {image}}}",
        f"model.text={{arch: clip, pretrained: false, options: {text}}}",
        f"losses.mlm.depth={size['cmt']}",
        "losses.mlm.clean_captions=true",  # the golden batch has clean captions and masked ones
        f"losses.id.weight={size['id_w']}",
        f"losses.mlm.weight={size['mlm_w']}",
        "solver.lr=1e-4",
    ]


def golden_weights(golden: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The model's state dict, under its authors' names."""
    return {name[2:]: torch.from_numpy(value) for name, value in golden.items() if name.startswith("w/")}


def golden_task(golden: dict[str, np.ndarray], *overrides: str, recipe: str | Path = RECIPE) -> RetrievalTask:
    config = load_config(recipe, [*golden_overrides(golden), *overrides])
    task = build_task(config, num_pids=json.loads(str(golden["cfg_json"]))["nc"])
    report = load_converted(task, irra(golden_weights(golden)), LoadReport("golden", "irra"))
    assert set(report.missing) <= {name for name in task.state_dict() if name.startswith("objectives")}
    return task


def golden_batch(golden: dict[str, np.ndarray]) -> Batch:
    batch = {
        name: torch.from_numpy(golden[f"in/{name}"])
        for name in ("images", "caption_ids", "mlm_ids", "mlm_labels", "pids")
    }
    return batch | {"mlm_positions": batch["mlm_labels"].flatten().nonzero().squeeze(1)}


@pytest.fixture
def task(model_golden: dict[str, np.ndarray]) -> RetrievalTask:
    return golden_task(model_golden)


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


def features_are_the_authors(task: RetrievalTask, golden: dict[str, np.ndarray]) -> None:
    batch = golden_batch(golden)
    image, text = task.encode_image(batch["images"]), task.encode_text(batch["caption_ids"])
    close(image.tokens, golden["out/image_feats"])
    close(image.embedding, golden["out/encode_image"])
    close(text.tokens, golden["out/text_feats"])
    close(text.embedding, golden["out/encode_text"])


def gradients_are_the_authors(task: RetrievalTask, golden: dict[str, np.ndarray], version: str) -> int:
    """All norms, and the gradients that are stored whole: how many those are."""
    gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
    norms = json.loads(str(golden[f"{version}/grad_norms_json"]))
    assert len(norms) == len([name for name in golden if name.startswith("w/")])
    for name, norm in norms.items():
        parts = [gradients[ours] for ours in renamed(name, IRRA_RULES)]
        ours = torch.stack([part.norm() for part in parts if part is not None]).norm()
        np.testing.assert_allclose(float(ours), norm, rtol=2e-4, atol=1e-6, err_msg=name)
    whole = {n: torch.from_numpy(golden[f"{version}_grad/{n}"]) for n in norms if f"{version}_grad/{n}" in golden}
    for name, expected in irra(whole).items():
        actual = gradients[name]
        assert actual is not None
        close(actual, expected.numpy(), 2e-5 * float(expected.abs().max()))
    return len(whole)


def test_both_towers_give_the_authors_features(task: RetrievalTask, model_golden: dict[str, np.ndarray]) -> None:
    features_are_the_authors(task, model_golden)
    batch = golden_batch(model_golden)
    close(task.encode_text(batch["mlm_ids"]).tokens, model_golden["out/mlm_feats"])


def test_text_cut_to_the_longest_caption_gives_the_same_features(
    task: RetrievalTask, model_golden: dict[str, np.ndarray]
) -> None:
    ids = golden_batch(model_golden)["caption_ids"][1:]  # row 0 fills the context
    length = int(ids.any(dim=0).nonzero().max()) + 1
    assert length < ids.shape[1]
    whole, cut = task.encode_text(ids), task.encode_text(ids[:, :length])
    torch.testing.assert_close(cut.embedding, whole.embedding, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.tokens, whole.tokens[:, :length], rtol=0, atol=1e-5)


def test_heads_give_the_authors_scores(task: RetrievalTask, model_golden: dict[str, np.ndarray]) -> None:
    step = task.encode(golden_batch(model_golden))
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
    step = task.encode(Collate(full_text=task.full_text)(items))
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
    weights = {"id_loss": size["id_w"], "mlm_loss": size["mlm_w"]}  # theirs are stored times their weight
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


def test_position_grid_is_resized_as_the_authors_do(model_golden: dict[str, np.ndarray]) -> None:
    rows, columns = (int(number) for number in model_golden["posembed/hw"])
    resized = resize_position_grid(torch.from_numpy(model_golden["posembed/src"])[None], (rows, columns))
    close(resized[0], model_golden["posembed/dst"])


def test_overlapping_patches_make_the_finer_grid() -> None:
    image = "options: {embed_dim: 64, depth: 1, num_heads: 1, patch_size: 8}"
    text = "options: {hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 1, vocab_size: 50}"
    overrides = [
        "data.image_size=[32, 16]",
        "model.embed_dim=64",
        f"model.image={{arch: {ARCH}, stride: 4, pretrained: false, {image}}}",
        f"model.text={{arch: clip, pretrained: false, {text}}}",
    ]
    config = load_config("configs/baseline.yaml", overrides)
    tokens = build_task(config, 2).encode_image(torch.zeros(1, 3, 32, 16)).tokens
    assert tokens.shape == (1, 1 + ((32 - 8) // 4 + 1) * ((16 - 8) // 4 + 1), 64)


def test_published_checkpoint_file_loads(model_golden: dict[str, np.ndarray], tmp_path) -> None:
    weights = golden_weights(model_golden)
    save_checkpoint(tmp_path / "best.pth", {"model": weights, "epoch": 3})
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    report = load_weights(fresh, tmp_path / "best.pth", format="irra")
    assert not report.missing and not report.unexpected and not report.resized
    close(fresh.encode_image(golden_batch(model_golden)["images"]).embedding, model_golden["out/encode_image"])


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


def test_openai_weights_load_into_the_encoder_and_the_heads_start_fresh(
    model_golden: dict[str, np.ndarray], tmp_path
) -> None:
    prefix = "w/base_model."
    weights = {n.removeprefix(prefix): torch.from_numpy(v) for n, v in model_golden.items() if n.startswith(prefix)}
    weights["logit_scale"] = torch.tensor(4.6)  # OpenAI's archive has it; it is no weight here
    save_checkpoint(tmp_path / "clip.pt", {name: value.half() for name, value in weights.items()})
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    report = load_weights(fresh, tmp_path / "clip.pt", format="openai")
    assert not report.unexpected and all(name.startswith("objectives.") for name in report.missing)
    assert next(fresh.parameters()).dtype == torch.float32
    close(fresh.encode_image(golden_batch(model_golden)["images"]).embedding, model_golden["out/encode_image"], 2e-2)


def test_another_image_size_resizes_the_position_grid_and_says_so(model_golden: dict[str, np.ndarray]) -> None:
    source = torch.from_numpy(model_golden["posembed/src"])
    weights = golden_weights(model_golden)
    weights["base_model.visual.positional_embedding"] = source
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    report = load_converted(fresh, irra(weights), LoadReport("x.pth", "irra"))
    assert report.resized == ["encoder.image.trunk.pos_embed"]
    close(fresh.state_dict()["encoder.image.trunk.pos_embed"][0], model_golden["posembed/dst"])


def test_a_checkpoint_without_a_weight_of_the_encoder_is_refused(model_golden: dict[str, np.ndarray]) -> None:
    weights = golden_weights(model_golden)
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    lacking = {name: value for name, value in weights.items() if "ln_final" not in name}
    with pytest.raises(
        CheckpointError, match=r"x\.pth.*2 of the encoder's tensors are missing in it: .*text\.trunk\.final_layer_norm"
    ):
        load_converted(fresh, irra(lacking), LoadReport("x.pth", "irra"))
