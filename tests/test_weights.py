"""Weights on disk: every format is recognised, gives the right features, and loads whole or not at all."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from configs.schema import InitConfig, load_config
from model.build import build_task
from model.checkpoints.files import read_weights, state_dict_of
from model.checkpoints.formats import FORMATS, openai, own, recognise
from model.checkpoints.torchscript import read_torchscript
from model.load import LoadReport, load_converted, load_init, load_weights
from model.task import RetrievalTask
from tests.conftest import ARCH, GOLDEN, ROOT
from tests.test_irra_model import (
    RECIPE,
    close,
    features_are_the_authors,
    golden_batch,
    golden_overrides,
    golden_weights,
)
from utils.errors import CheckpointError, ConfigError

# The sizes of the CLIP that open_clip and transformers make here for comparison.
VISION = {"width": 128, "layers": 2, "patch_size": 16, "head_width": 64}
TEXT = {"width": 128, "layers": 2, "heads": 2, "context_length": 77, "vocab_size": 600}
OVERRIDES = [
    "model.embed_dim=96",
    f"model.image={{arch: {ARCH}, pretrained: false, options: {{embed_dim: 128, depth: 2, num_heads: 2}}}}",
    "model.text={arch: clip, pretrained: false, options: {vocab_size: 600, hidden_size: 128, num_hidden_layers: 2, "
    "num_attention_heads: 2, intermediate_size: 512}}",
]


def their_clip(size: tuple[int, int]) -> open_clip.CLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(96, {**VISION, "image_size": size}, TEXT, quick_gelu=True)
    for parameter in model.parameters():  # open_clip begins with zeros and ones in places
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def our_clip(*overrides: str) -> RetrievalTask:
    return build_task(load_config(ROOT / "configs/baseline.yaml", [*OVERRIDES, *overrides]), None)


class Archived(nn.Module):
    """A module tree with the names of a state dict: what OpenAI's archive looks like from outside."""

    def forward(self) -> int:
        return 0


def save_torchscript(state: dict[str, Tensor], path: Path) -> None:
    root = Archived()
    for name, value in state.items():
        *folders, leaf = name.split(".")
        module: nn.Module = root
        for folder in folders:
            if not hasattr(module, folder):
                module.add_module(folder, Archived())
            module = getattr(module, folder)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
    for name in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(name, torch.tensor(77))
    torch.jit.script(root).save(str(path))


def save_plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def save_wrapped(state: dict[str, Tensor], path: Path) -> None:
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": wrapped}, path)


def save_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


CONTAINERS: dict[str, tuple[Callable[[dict[str, Tensor], Path], None], str]] = {
    "TorchScript archive": (save_torchscript, "ViT-B-16.pt"),
    "state dict": (save_plain, "clip.pt"),
    "state dict of DataParallel in a checkpoint": (save_wrapped, "clip.pth"),
    "legacy file": (save_legacy, "clip.pth"),
    "safetensors": (save_safetensors, "open_clip_model.safetensors"),
}


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


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in their_clip((224, 224)).state_dict().items()}
    save_torchscript(state, tmp_path / "clip.pt")
    ours = our_clip()
    load_weights(ours, tmp_path / "clip.pt")
    loaded = ours.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    weight = loaded["encoder.text.trunk.embeddings.token_embedding.weight"]
    assert torch.equal(weight, state["token_embedding.weight"].float())


def test_an_archive_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    state = their_clip((224, 224)).state_dict() | {
        "visual.w": torch.arange(12.0).reshape(3, 4).T,
        "b": torch.tensor([]),
    }
    save_torchscript(state, tmp_path / "a.pt")
    expected = torch.jit.load(str(tmp_path / "a.pt")).state_dict()
    read = read_torchscript(tmp_path / "a.pt")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in expected.items())


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
        # As older versions saved it: with counters of positions.
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


def encoder_only(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.startswith("base_model.")}


def with_module(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in weights.items()}


def fmfa_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The classifier has a row per training caption."""
    classifier = {"classifier.weight": torch.zeros(99, weights["classifier.weight"].shape[1])}
    return with_module(weights | classifier | {"classifier.bias": torch.zeros(99)})


def rde(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """IRRA's encoder and two token selection layers, with RDE's names of them."""
    layers = {}
    for layer in ("visul_emb_layer", "texual_emb_layer"):
        sizes = {"linear": (48, 64), "fc": (48, 64), "mlp.layers.0": (24, 64), "mlp.layers.1": (48, 24)}
        for name, (rows, columns) in sizes.items():
            if (layer, name) != ("texual_emb_layer", "fc"):
                layers |= {
                    f"{layer}.{name}.weight": torch.randn(rows, columns),
                    f"{layer}.{name}.bias": torch.randn(rows),
                }
        for name, size in {"mlp.bns.0": 24, "mlp.bns.1": 48}.items():
            for part in ("weight", "bias", "running_mean", "running_var"):
                layers[f"{layer}.{name}.{part}"] = torch.rand(size)
            layers[f"{layer}.{name}.num_batches_tracked"] = torch.tensor(7)
    return encoder_only(weights) | layers


# format -> (what its authors' files hold, what the names alone make of it, heads that find a place in an IRRA)
PUBLISHED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str, bool]] = {
    "irra": (dict, "irra", True),
    "fmfa": (with_module, "irra", True),
    "rde": (rde, "rde", False),
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
    assert all(name.startswith(rest) for name in report.unexpected)  # token selection is no part of CLIP's encoder
    assert bool(report.unexpected) == (format == "rde")
    features_are_the_authors(task, model_golden)


def test_a_classifier_of_another_size_is_dropped_and_named(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_plain(fmfa_head(golden_weights(model_golden)), tmp_path / "best0.pth")
    config = load_config(RECIPE, golden_overrides(model_golden))
    training, testing = build_task(config, num_pids=11), build_task(config, None)
    fresh = training.state_dict()["objectives.id.classifier.weight"].clone()
    report = load_weights(training, tmp_path / "best0.pth", format="fmfa")
    classifier = ["objectives.id.classifier.weight", "objectives.id.classifier.bias"]
    assert sorted(report.dropped) == sorted(classifier) and not report.missing and not report.unexpected
    assert torch.equal(training.state_dict()[classifier[0]], fresh)
    assert "of another size, start fresh" in report.table() and classifier[0] in report.table()
    report = load_weights(testing, tmp_path / "best0.pth", format="fmfa")
    assert set(classifier) < set(report.unexpected) and not report.dropped
    (line,) = [line for line in report.table().splitlines() if "unexpected, not used" in line]
    assert "objectives.id 2" in line and "objectives.mlm" in line
    batch = golden_batch(model_golden)
    close(testing.encode_image(batch["images"]).embedding, model_golden["out/encode_image"])


def test_every_tensor_of_the_full_size_irra_is_placed_in_its_shape() -> None:
    reference = json.loads((GOLDEN / "irra_vitb16_state_dict.json").read_text())
    config = load_config(RECIPE, ["model.image.pretrained=false", "model.text.pretrained=false"])
    with torch.device("meta"):
        task = build_task(config, num_pids=reference["num_classes"])
        state = {name: torch.empty(entry["shape"]) for name, entry in reference["state_dict"].items()}
    assert len(state) == 367 and recognise(state) == "irra"
    report = load_converted(task, FORMATS.get("irra", "format")(state), LoadReport("x", "irra"))
    assert set(report.loaded) == set(task.state_dict()) and not report.unexpected and not report.resized


def test_our_own_checkpoint_loads_with_and_without_its_heads(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    config = load_config(RECIPE, golden_overrides(model_golden))
    first, second = build_task(config, num_pids=11), build_task(config, num_pids=5)
    torch.save({"model": first.state_dict(), "epoch": 2}, tmp_path / "best.pt")
    report = load_weights(second, tmp_path / "best.pt")
    assert report.format == "own" and len(report.dropped) == 2 and not report.missing
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]) == (".classifier." not in name)
    baseline = load_config(RECIPE, [*golden_overrides(model_golden), "losses.mlm=null", "losses.itc={}"])
    report = load_init(build_task(baseline, num_pids=11), InitConfig(str(tmp_path / "best.pt")))
    assert report is not None and {name.split(".")[1] for name in report.unexpected} == {"mlm"}
    assert own(first.state_dict()).keys() == first.state_dict().keys()


def cut(path: Path, part: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


@pytest.mark.parametrize("part", [0, 0.3, 0.99])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_short_is_named(container: str, part: float, tmp_path: Path) -> None:
    save, name = CONTAINERS[container]
    save({"visual.conv1.weight": torch.randn(40, 40)}, tmp_path / name)
    cut(tmp_path / name, part)
    with pytest.raises(CheckpointError, match=rf"{name}: damaged or no checkpoint"):
        load_weights(our_clip(), tmp_path / name)


@pytest.mark.parametrize("container", CONTAINERS)
def test_damaged_bytes_never_end_in_a_traceback(container: str, tmp_path: Path) -> None:
    save, name = CONTAINERS[container]
    save({"visual.conv1.weight": torch.randn(8, 8)}, tmp_path / name)
    good, task, rng = (tmp_path / name).read_bytes(), our_clip(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(good)
        for place in rng.integers(len(good), size=rng.choice([1, 3, 30])):
            damaged[place] = rng.integers(256)
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError):  # at least, weights are missing
            load_weights(task, tmp_path / name)


def hugging_face_folder_with(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda folder: None, r"has no weights in it \(model\.safetensors"),
    "safetensors no safetensors": (hugging_face_folder_with("model.safetensors", b"{}"), "damaged or no checkpoint"),
    "bin no checkpoint": (hugging_face_folder_with("pytorch_model.bin", b"\x00" * 9), r"model\.bin: damaged or no"),
    "index no JSON": (hugging_face_folder_with("model.safetensors.index.json", b"{"), "damaged or no checkpoint"),
    "index without map": (hugging_face_folder_with("model.safetensors.index.json", b"{}"), "damaged.*weight_map"),
    "index of a list": (hugging_face_folder_with("model.safetensors.index.json", b"[1]"), "damaged or no checkpoint"),
    "shard gone": (
        hugging_face_folder_with("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}'),
        "no such checkpoint",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_without_good_weights_is_named(case: str, tmp_path: Path) -> None:
    make, message = BAD_FOLDERS[case]
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(our_clip(), tmp_path)


BAD_CONTENTS: dict[str, tuple[Any, str]] = {
    "empty": ({}, "holds no state dict.*it is empty"),
    "numbers": ({"lr": 0.1}, r"holds no state dict.*'lr' is a float"),
    "nested too deep": ({"model": {"weights": {"a": torch.zeros(1)}}}, "'weights' is a dict"),
    "of no known format": (
        {"backbone.w": torch.zeros(1)},
        r"of no format known here \(own, openai.*called backbone\.w",
    ),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_a_file_without_known_weights_is_named(case: str, tmp_path: Path) -> None:
    content, message = BAD_CONTENTS[case]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth.*" + message):
        load_weights(our_clip(), tmp_path / "x.pth")


def test_an_archive_with_another_class_is_refused(tmp_path: Path) -> None:
    """Its pickle is not run either."""

    class Bomb:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(tmp_path / 'was_run')!r}, 'w')",)

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", pickle.dumps({"w": Bomb()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"a\.pt: damaged or no checkpoint \(it holds a .*eval\)"):
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "was_run").exists()


def untouched(task: RetrievalTask, load: Callable[[], object], match: str) -> str:
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        load()
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    return str(caught.value)


def test_tensors_of_another_shape_are_a_table_and_nothing_is_loaded(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    weights = golden_weights(model_golden)
    for name in [name for name in weights if "ln_1" in name]:
        weights[name] = torch.zeros(7)
    torch.save({"model": weights}, tmp_path / "x.pth")
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    message = untouched(
        task, lambda: load_weights(task, tmp_path / "x.pth"), r"x\.pth \(format irra\) does not fit.*nothing was loaded"
    )
    assert "encoder.image.trunk.blocks.0.norm1.weight" in message
    assert "(7,)" in message and "(64,)" in message and "tensors are of another shape" in message
    assert "missing" not in message


def test_a_grid_of_another_form_is_in_the_table(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), None)
    torch.save(task.state_dict() | {"encoder.image.trunk.pos_embed": torch.zeros(64)}, tmp_path / "x.pth")
    message = untouched(task, lambda: load_weights(task, tmp_path / "x.pth"), "1 tensors are of another shape")
    assert "encoder.image.trunk.pos_embed" in message and "(64,)" in message


def test_a_deeper_model_is_refused_for_what_has_no_place(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch.save(golden_weights(model_golden), tmp_path / "x.pth")
    shallow = [*golden_overrides(model_golden), "model.text.options.num_hidden_layers=1"]
    task = build_task(load_config(RECIPE, shallow), num_pids=11)
    untouched(
        task,
        lambda: load_weights(task, tmp_path / "x.pth"),
        r"\d+ of the encoder's tensors are in it, but not in this model: encoder\.text\.trunk\.encoder\.layers\.1",
    )


def test_the_wrong_format_is_refused(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch.save(golden_weights(model_golden), tmp_path / "x.pth")
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), None)
    untouched(task, lambda: load_weights(task, tmp_path / "x.pth", format="huggingface"), "tensors are missing in it")
    odd = golden_weights(model_golden) | {"base_model.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(2)}
    torch.save(odd, tmp_path / "odd.pth")
    untouched(task, lambda: load_weights(task, tmp_path / "odd.pth"), r"odd\.pth.* is not of format irra")


def test_a_grid_that_is_not_square_cannot_be_resized_and_says_how_to_load_it(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    torch.save(golden_weights(model_golden), tmp_path / "x.pth")
    task = build_task(load_config(RECIPE, [*golden_overrides(model_golden), "data.image_size=[64, 64]"]), None)
    untouched(
        task,
        lambda: load_weights(task, tmp_path / "x.pth"),
        r"pos_embed cannot be resized.*no square grid.*data\.image_size",
    )


def test_prefixes_and_wrappers_are_taken_off() -> None:
    tensor = torch.zeros(1)
    assert state_dict_of({"model": {"module.a": tensor}, "epoch": 1}, "x").keys() == {"a"}
    assert state_dict_of({"state_dict": {"a": tensor}}, "x").keys() == {"a"}
    assert state_dict_of({"module.a": tensor, "b": tensor}, "x").keys() == {"module.a", "b"}


def test_every_tensor_of_rde_that_its_code_uses_has_a_place(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    weights = with_module(rde(golden_weights(model_golden)))
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


def test_token_selection_starts_fresh_from_a_clip(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_plain(encoder_only(golden_weights(model_golden)), tmp_path / "clip.pth")
    sizes = [override for override in golden_overrides(model_golden) if not override.startswith("losses.")]
    task = build_task(load_config("configs/rde.yaml", [*sizes, "model.selected_dim=48"]), num_pids=11)
    report = load_weights(task, tmp_path / "clip.pth")
    assert len(report.missing) == 22 and all(name.startswith("encoder.selection.") for name in report.missing)
    assert "missing, start fresh" in report.table()
    features_are_the_authors(task, model_golden)


def test_tensors_may_be_skipped(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_plain(golden_weights(model_golden), tmp_path / "best.pth")
    config = load_config(RECIPE, golden_overrides(model_golden))
    task = build_task(config, num_pids=11)
    fresh = {name: value.clone() for name, value in task.state_dict().items()}
    report = load_init(task, InitConfig(str(tmp_path / "best.pth"), skip=["pos_embed$", r"mlm_head\."]))
    assert report is not None and not report.missing and not report.unexpected
    heads = [name for name in fresh if ".mlm_head." in name]
    assert sorted(report.skipped) == sorted(["encoder.image.trunk.pos_embed", *heads])
    assert "skipped, start fresh" in report.table() and "encoder.image.trunk.pos_embed" in report.table()
    loaded = task.state_dict()
    assert all(torch.equal(loaded[name], fresh[name]) for name in report.skipped)
    assert not torch.equal(loaded["encoder.image.trunk.cls_token"], fresh["encoder.image.trunk.cls_token"])
    load_init(task, InitConfig(str(tmp_path / "best.pth"), skip=["pos_embed", "trunk.pos_embed"]))  # twice the same
    with pytest.raises(ConfigError, match=r"init\.skip: 'positions' matches no tensor of .*best\.pth"):
        load_init(task, InitConfig(str(tmp_path / "best.pth"), skip=["positions"]))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init.skip=[pos_embed]"], r"init\.skip: names tensors of init\.path, which is not set"),
        (["init.path=a.pt", "init.skip=['(']"], r"init\.skip: '\(' is no regular expression"),
    ],
)
def test_bad_skips_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, overrides)
