"""Checkpoint formats: each is recognised, gives its authors' features, and has a place for every tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from configs.schema import load_config
from model.build import build_task
from model.checkpoints.formats import FORMATS, ivt, openai, recognise
from model.load import LoadReport, load_converted, load_weights
from tests.helpers.checkpoints import (
    CONTAINERS,
    encoder_only,
    our_clip,
    rde_weights,
    save_plain,
    their_clip,
    with_module,
)
from tests.helpers.configs import GOLDEN, ROOT
from tests.helpers.golden import RECIPE, features_are_the_authors, golden_overrides, golden_weights


@pytest.mark.parametrize("size", [(224, 224), (384, 128)])
@pytest.mark.parametrize("container", CONTAINERS)
def test_openai_weights_give_open_clips_features(container: str, size: tuple[int, int], tmp_path: Path) -> None:
    save, name = CONTAINERS[container]
    theirs = their_clip((224, 224))
    save(theirs.state_dict(), tmp_path / name)
    ours = our_clip(f"data.image_size={list(size)}")
    report = load_weights(ours, tmp_path / name)
    assert report.format == "openai" and not report.missing and not report.unexpected
    assert len(report.loaded) == len(ours.state_dict())
    assert report.resized == ([] if size == (224, 224) else ["encoder.image.trunk.pos_embed"])
    if size != (224, 224):
        state = theirs.state_dict()
        grid = state["visual.positional_embedding"][1:].T.reshape(1, -1, 14, 14)
        grid = F.interpolate(grid, (size[0] // 16, size[1] // 16), mode="bilinear", align_corners=False)[0].flatten(1).T
        state["visual.positional_embedding"] = torch.cat([state["visual.positional_embedding"][:1], grid])
        theirs = their_clip(size)
        theirs.load_state_dict(state)
    images, ids = torch.randn(2, 3, *size), torch.randint(1, 599, (3, 77))
    ids[:, 20], ids[:, 21:] = 599, 0  # the end of text has the largest id
    with torch.no_grad():
        image, text = ours.encode_image(images).embedding, ours.encode_text(ids).embedding
        np.testing.assert_allclose(image.numpy(), theirs.encode_image(images).numpy(), atol=1e-5)
        np.testing.assert_allclose(text.numpy(), theirs.encode_text(ids).numpy(), atol=1e-5)


@pytest.mark.parametrize("arch, dim", [("ViT-B-32-quickgelu", 512), ("ViT-L-14-quickgelu", 768)])
def test_other_openai_models_have_a_place_for_every_weight(arch: str, dim: int) -> None:
    kind = {"ViT-B-32-quickgelu": "base_patch32", "ViT-L-14-quickgelu": "large_patch14"}[arch]
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(arch))
        config = load_config(
            ROOT / "configs/baseline.yaml",
            [
                f"model.embed_dim={dim}",
                f"model.image={{arch: vit_{kind}_clip_quickgelu_224.openai, pretrained: false}}",
                f"model.text={{arch: openai/clip-vit-{kind.replace('_', '-')}, pretrained: false}}",
            ],
        )
        ours = build_task(config, None)
    state = openai(theirs.state_dict())
    position = state.pop("encoder.image.trunk.pos_embed")
    state["encoder.image.trunk.pos_embed"] = ours.state_dict()["encoder.image.trunk.pos_embed"]
    assert position.shape[2] == state["encoder.image.trunk.pos_embed"].shape[2]
    report = load_converted(ours, state, LoadReport("x", "openai"))
    assert len(report.loaded) == len(ours.state_dict()) and not report.unexpected


@pytest.mark.parametrize("kind", ["one file", "shards", "pytorch_model.bin"])
def test_a_hugging_face_folder_gives_transformers_features(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    text = sizes | {"vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599}
    vision = sizes | {"image_size": 64, "patch_size": 16}
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB" if kind == "shards" else "1GB")
    if kind == "pytorch_model.bin":
        # Older versions also saved position ids.
        old = theirs.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        torch.save(old, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    files = len(list(tmp_path.glob("*.safetensors")))
    assert {"one file": files == 1, "shards": files > 1, "pytorch_model.bin": files == 0}[kind]
    ours = our_clip("data.image_size=[64, 64]")
    report = load_weights(ours, tmp_path)
    assert report.format == "huggingface" and not report.missing and not report.unexpected and not report.resized
    images, ids = torch.randn(2, 3, 64, 64), torch.randint(1, 598, (3, 77))
    ids[:, 20], ids[:, 21:] = 599, 0
    with torch.no_grad():
        expected_image = theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)
        expected_text = theirs.text_projection(theirs.text_model(input_ids=ids).pooler_output)
        np.testing.assert_allclose(ours.encode_image(images).embedding.numpy(), expected_image.numpy(), atol=1e-5)
        np.testing.assert_allclose(ours.encode_text(ids).embedding.numpy(), expected_text.numpy(), atol=1e-5)


# --- published checkpoints --------------------------------------------------------------------------------------------


# format -> (contents of its authors' files, format recognised from the names, whether its heads fit an IRRA)
PUBLISHED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str, bool]] = {
    "irra": (dict, "irra", True),
    "fmfa": (with_module, "irra", True),
    "rde": (rde_weights, "rde", False),
    "mllm4text": (encoder_only, "irra", False),
    "ham": (lambda weights: with_module(encoder_only(weights)), "irra", False),
}


@pytest.mark.parametrize("given", [True, False], ids=["format given", "recognised"])
@pytest.mark.parametrize("format", PUBLISHED)
def test_a_published_checkpoint_gives_its_authors_outputs(
    format: str, given: bool, model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    make, recognised, heads = PUBLISHED[format]
    weights = golden_weights(model_golden)
    optimizer = {"state": {0: {"step": 3.0, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    scheduler = {"milestones": (20, 50), "mode": "cosine", "last_epoch": 4, "base_lrs": [1e-5], "warmup_factor": 0.1}
    content = {"model": make(weights), "optimizer": optimizer, "scheduler": scheduler, "epoch": 4, "iteration": 0}
    torch.save(content, tmp_path / "best.pth")
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    report = load_weights(task, tmp_path / "best.pth", format=format if given else None)
    assert report.format == (format if given else recognised) and report.epoch == 4
    if heads:
        assert not report.missing and not report.unexpected
    else:
        assert report.missing and all(name.startswith("objectives.") for name in report.missing)
    rest = ("encoder.selection.", "visul_emb_layer.linear.", "visul_emb_layer.mlp.bns.1", "texual_emb_layer.mlp.bns.1")
    assert all(name.startswith(rest) for name in report.unexpected)  # token selection is not in CLIP's encoder
    assert bool(report.unexpected) == (format == "rde")
    features_are_the_authors(task, model_golden)


def test_every_tensor_of_the_full_size_irra_is_placed_in_its_shape() -> None:
    reference = json.loads((GOLDEN / "irra_vitb16_state_dict.json").read_text())
    config = load_config(RECIPE, ["model.image.pretrained=false", "model.text.pretrained=false"])
    with torch.device("meta"):
        task = build_task(config, num_pids=reference["num_classes"])
        state = {name: torch.empty(entry["shape"]) for name, entry in reference["state_dict"].items()}
    assert len(state) == 367 and recognise(state) == "irra"
    report = load_converted(task, FORMATS.get("irra", "format")(state), LoadReport("x", "irra"))
    assert set(report.loaded) == set(task.state_dict()) and not report.unexpected and not report.resized


def test_every_tensor_of_rde_that_its_code_uses_has_a_place(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    weights = with_module(rde_weights(golden_weights(model_golden)))
    save_plain(weights, tmp_path / "best.pth")
    sizes = [override for override in golden_overrides(model_golden) if not override.startswith("losses.")]
    task = build_task(load_config("configs/rde.yaml", [*sizes, "model.selected_dim=48"]), num_pids=11)
    report = load_weights(task, tmp_path / "best.pth")
    assert report.format == "rde" and not report.missing
    assert sorted({name.rsplit(".", 1)[0] for name in report.unexpected}) == [
        "texual_emb_layer.mlp.bns.1",
        "visul_emb_layer.linear",
        "visul_emb_layer.mlp.bns.1",
    ]
    state = task.state_dict()
    for tower, layer, skip in (("image", "visul_emb_layer", "fc"), ("text", "texual_emb_layer", "linear")):
        places = {"hidden": "mlp.layers.0", "out": "mlp.layers.1", "norm": "mlp.bns.0", "skip": skip}
        for ours, theirs in places.items():
            prefix = f"module.{layer}.{theirs}."
            found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            assert len(found) == (5 if ours == "norm" else 2)
            for kind, value in found.items():
                assert torch.equal(state[f"encoder.selection.{tower}.{ours}.{kind}"], value)
    features_are_the_authors(task, model_golden)


def checkpoint_keys() -> dict[str, dict[str, list[int]]]:
    keys = json.loads((GOLDEN / "ivt_checkpoint_keys.json").read_text())
    return {name: dict(value) for name, value in keys.items() if isinstance(value, dict | list)}


UNUSED = ("temp", "classifier_img.", "bottleneck_img.", "encoder_fusion.", "itm.")  # not read by the authors' retrieval


@pytest.mark.parametrize(
    "file, config",
    [
        ("finetune_cuhk_pedes_stride12_classes11003", "ivt.yaml"),
        ("finetune_rstpreid_stride16_classes3701", "ivt_rstpreid.yaml"),
        ("pretrain_stride16", "ivt_rstpreid.yaml"),
    ],
)
def test_every_published_tensor_has_a_place_or_a_reason(file: str, config: str) -> None:
    shapes = checkpoint_keys()[file]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert recognise(state) == "ivt"
    with torch.device("meta"):
        task = build_task(load_config(ROOT / "configs" / config), num_pids=9, weights=False)
    own = {name: value.shape for name, value in task.state_dict().items()}
    converted = ivt(state)
    placed = {name: value.shape for name, value in converted.items() if name in own}
    assert placed == own and len(own) == 204
    rest = converted.keys() - own.keys()
    assert all(name.startswith(UNUSED) for name in rest)
    counters = [name for name in state if name.endswith("position_ids")]
    assert len(state) == len(own) + len(rest) + len(counters)
