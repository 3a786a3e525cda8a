"""Towers: pretrained weights from small files in the libraries' own formats, patch grids, activation checkpointing."""

import functools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from configs.schema import load_config
from model.build import build_task
from model.checkpoints.grids import resize_position_grid
from model.task import RetrievalTask
from tests.helpers.checkpoints import Bomb, saved_vit
from tests.helpers.configs import ARCH, GOLDEN, TINY, config_of
from tests.helpers.golden import close
from tests.helpers.steps import exact_task, micro_batches_of, same_step, step_of, take_gradients
from tests.helpers.tasks import tiny_encoder
from utils.errors import CheckpointError, ConfigError

# Text tower of TINY.
TEXT = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "bos_token_id": 1022,
    "eos_token_id": 1023,
}


def text_folder(folder: Path, projection_dim: int = 64) -> Path:
    torch.manual_seed(0)
    CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=projection_dim, **TEXT)).save_pretrained(folder)
    return folder


def test_a_saved_clip_text_tower_is_loaded_with_its_projection(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    encoder = tiny_encoder(f"model.text={{arch: {folder}, pretrained: true}}")
    ids = torch.tensor([[1022, 5, 9, 1023, 0]])
    reference = CLIPTextModelWithProjection.from_pretrained(folder)
    torch.testing.assert_close(encoder.encode_text(ids).embedding, reference(input_ids=ids).text_embeds)
    assert encoder.vocab_size == 1024


def test_a_text_tower_of_another_width_or_length_is_an_error(tmp_path: Path) -> None:
    folder = text_folder(tmp_path, projection_dim=32)
    with pytest.raises(ConfigError, match=r"model\.embed_dim: must be 32 like the projection of .*, got 64"):
        tiny_encoder(f"model.text={{arch: {folder}, pretrained: true}}")
    with pytest.raises(ConfigError, match=r"data\.text_length: must be at most 77, .*, got 90"):
        tiny_encoder(f"model.text={{arch: {folder}, pretrained: true}}", "data.text_length=90")
    with pytest.raises(ConfigError, match=r"model\.text\.options: transformers cannot load"):
        tiny_encoder(f"model.text={{arch: {folder}, pretrained: true}}", "model.text.options.hidden_size=128")


def publish(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Let timm take a file for the weights of a name, as if it came from the hub."""
    entry = {"file": str(file), "num_classes": 64}
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, pretrained_cfg_overlay=entry))


def test_a_pretrained_vision_tower_is_loaded_and_its_position_grid_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 16}
    source = timm.create_model(ARCH, num_classes=64, **sizes)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    publish(monkeypatch, tmp_path / "vit.pth")
    encoder = tiny_encoder("model.image.pretrained=true")
    loaded, expected = encoder.state_dict(), source.state_dict()
    assert loaded["image.trunk.pos_embed"].shape == (1, 1 + 4 * 2, 64)
    torch.testing.assert_close(loaded["image.trunk.pos_embed"], resize_position_grid(expected["pos_embed"], (4, 2)))
    torch.testing.assert_close(loaded["image.projection.weight"], expected["head.weight"])
    torch.testing.assert_close(loaded["image.trunk.blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize(
    "option",
    [
        "checkpoint_path: FILE", "pretrained_cfg: {file: FILE}", "pretrained_cfg_overlay: {file: FILE}",
        "pretrained_cfg: {hf_hub_id: a/b}", "pretrained: true", "cache_dir: FILE", "state_dict: {}", "config: FILE",
        "_name_or_path: FILE", "trust_remote_code: true", "gguf_file: FILE", "attn_implementation: a/b",
        "quantization_config: {}", "auto_map: {}", "features_only: true", "adapter_kwargs: {}", "weights_only: false",
    ],
)  # fmt: skip
def test_options_of_a_tower_name_no_file_and_no_hub(option: str, tower: str, tmp_path: Path) -> None:
    file, trace = tmp_path / "a.pt", tmp_path / "was_run"
    torch.save({"model": Bomb(trace)}, file)
    for pretrained in ("true", "false"):
        with pytest.raises(ConfigError, match=rf"^model\.{tower}\.options\.{option.split(':')[0]}: unknown key"):
            tiny_encoder(
                f"model.{tower}.options={{{option.replace('FILE', str(file))}}}",
                f"model.{tower}.pretrained={pretrained}",
            )
    assert not trace.exists()


@pytest.mark.parametrize("arch", ["hf-hub:a/b", "local-dir:.", "hf_hub:a/b", "../a", "timm/vit_base_patch16_224"])
def test_an_architecture_names_no_file_and_no_hub(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.image\.arch: unknown timm model"):
        tiny_encoder(f"model.image.arch='{arch}'", "model.image.pretrained=true")


def test_evaluating_a_run_needs_no_pretrained_weights() -> None:
    pretrained = [f"model.{tower}.pretrained=true" for tower in ("image", "text")]
    message = r"model\.image\.arch: cannot get the weights of .* from the hub or its cache"
    with pytest.raises(ConfigError, match=message):
        tiny_encoder(*pretrained)  # tests have no network
    tiny_encoder(*pretrained, pretrained=False)


def test_a_vision_tower_starts_from_a_file_of_timms(tmp_path: Path) -> None:
    file, source = saved_vit(tmp_path, num_classes=64)
    torch.save({name: value for name, value in source.state_dict().items() if name != "head.bias"}, file)
    encoder = tiny_encoder(f"model.image.pretrained={file}", "data.image_size=[224, 224]")
    images = torch.randn(2, 3, 224, 224)
    expected = source.forward_features(images) @ source.head.weight.T
    torch.testing.assert_close(encoder.encode_image(images).tokens, expected)
    assert encoder.notes == ()
    tiny_encoder(f"model.image.pretrained={file}", pretrained=False)  # as in test.py: the file may be gone


def test_a_projection_of_another_width_starts_fresh_and_this_is_said(tmp_path: Path) -> None:
    file, source = saved_vit(tmp_path, num_classes=10)
    encoder = tiny_encoder(f"model.image.pretrained={file}")
    note, resized = encoder.notes
    assert resized.endswith(f"position grid of {file}: 14x14 ({ARCH}) resized to 4x2")
    assert (
        note == f"model.image: {file} has no projection to 64 dimensions (model.embed_dim), so it is initialised afresh"
    )
    loaded = encoder.state_dict()
    torch.testing.assert_close(loaded["image.trunk.norm.weight"], source.state_dict()["norm.weight"])
    assert loaded["image.projection.weight"].shape == (64, 64)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("missing", r"vit\.pth: no such checkpoint"),
        ("deeper", r"vit\.pth: does not fit the architecture.*missing \(blocks\.1\."),
        ("grid", r"pos_embed cannot be resized to this image size: 5 positions do not form a square"),
        (
            "flat grid",
            r"pos_embed cannot be resized to .*: shape must be \(1, positions, width\), got \(64,\)",
        ),
    ],
)
def test_a_vision_file_that_does_not_fit_is_refused(fault: str, message: str, tmp_path: Path) -> None:
    file, source = saved_vit(tmp_path, num_classes=64)
    options: list[str] = []
    if fault == "missing":
        file.unlink()
    if fault == "deeper":
        options = ["model.image.options.depth=2"]
    if fault == "grid":
        torch.save({**source.state_dict(), "pos_embed": torch.zeros(1, 6, 64)}, file)
    if fault == "flat grid":
        torch.save({**source.state_dict(), "pos_embed": torch.zeros(64)}, file)
    with pytest.raises(CheckpointError, match=message):
        tiny_encoder(f"model.image.pretrained={file}", *options)


def test_a_run_with_a_local_text_folder_is_evaluated_with_its_sizes(tmp_path: Path) -> None:
    """The tower that test.py builds has the sizes in the folder, but does not load its weights."""
    folder = text_folder(tmp_path)
    encoder = tiny_encoder(
        f"model.text={{arch: {folder}, pretrained: true}}", "model.text.options={}", pretrained=False
    )
    assert encoder.vocab_size == 1024
    assert encoder.state_dict()["text.projection.weight"].shape == (64, 64)


# --- patch grids ------------------------------------------------------------------------------------------------------


def test_position_grid_is_resized_as_the_authors_do(model_golden: dict[str, np.ndarray]) -> None:
    rows, columns = (int(number) for number in model_golden["posembed/hw"])
    resized = resize_position_grid(torch.from_numpy(model_golden["posembed/src"])[None], (rows, columns))
    close(resized[0], model_golden["posembed/dst"])


def test_position_grids_are_resized_as_the_authors_do() -> None:
    golden = np.load(GOLDEN / "ivt_posembed.npz")
    source = torch.from_numpy(golden["src"])
    for grid in ((31, 10), (24, 8)):
        close(resize_position_grid(source, grid), golden[f"dst_{grid[0]}x{grid[1]}"], 0)


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


# --- activation checkpointing -----------------------------------------------------------------------------------------


DEEPER = {  # deeper than TINY, with dropout if the model has it
    "irra": ["model.image.options.depth=3", "model.text.options.num_hidden_layers=3"],
    "rde": ["model.image.options.depth=3", "model.text.options.num_hidden_layers=3"],
    "ivt": ["model.image.options.depth=3", "model.drop_path=0.3"],
}


def kept(task: RetrievalTask, batch: dict[str, Tensor]) -> int:
    """Number of values that the autograd graph of the towers saves."""
    count = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal count
        count += value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        task.encode(batch)
    return count


@pytest.mark.parametrize(
    "method, towers", [("irra", "image"), ("irra", "text"), ("rde", "image text"), ("ivt", "image")]
)
def test_checkpointing_keeps_less_and_changes_no_gradient(method: str, towers: str, root: Path) -> None:
    plain = config_of(method, root, *DEEPER[method])
    config = config_of(
        method, root, *DEEPER[method], *(f"model.{tower}.checkpointing=true" for tower in towers.split())
    )
    found = []
    for one in (plain, config):
        task = exact_task(one).train()
        ((batch, _),) = micro_batches_of(one, task, 0)
        torch.manual_seed(4)
        total, _ = task(batch)
        total.backward()
        found.append((float(total.detach()), take_gradients(task), kept(task, batch)))
        task.eval()
        with torch.no_grad():
            task.encoder.encode_image(batch["images"])
    (total, gradients, numbers), (other, others, less) = found
    assert other == total and less < 0.9 * numbers
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-12, atol=1e-15)


def test_checkpointing_works_with_micro_batches(root: Path) -> None:
    more = ["model.image.checkpointing=true", "model.text.checkpointing=true", "train.accumulate=2"]
    same_step(step_of(config_of("rde", root, *more), 0), step_of(config_of("rde", root), 0))


# --- activations ------------------------------------------------------------------------------------------------------


def test_weights_that_timm_lists_for_quickgelu_are_refused_in_a_tower_with_gelu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 16}
    source = timm.create_model("vit_base_patch16_clip_224.openai", num_classes=64, **sizes)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    publish(monkeypatch, tmp_path / "vit.pth")
    wrong = ["model.image.arch=vit_base_patch16_clip_224.openai", "model.image.pretrained=true"]
    with pytest.raises(ConfigError, match=r"^model\.image\.arch: .*set model.image.arch=.*_clip_quickgelu_224\.openai"):
        tiny_encoder(*wrong)
    tiny_encoder(*wrong, "model.image.options.act_layer=quick_gelu")
    tiny_encoder(*wrong, "model.image.arch=vit_base_patch16_clip_224.laion2b")


def test_towers_with_different_activations_are_said() -> None:
    config = load_config("configs/baseline.yaml", [*TINY, "model.image.options.act_layer=gelu"])
    (note,) = build_task(config).notes
    assert "the towers have different activations (image gelu, text quick_gelu)" in note
    assert not build_task(load_config("configs/baseline.yaml", TINY)).notes


@pytest.mark.parametrize("arch", ["RN50", "resnet50", "resnet50_clip.openai", "ModifiedResNet"])
def test_resnet_towers_are_refused_by_name(arch: str, root: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.image\.arch: ResNet towers are not supported, got {arch}; use a vis"
    ):
        build_task(config_of("baseline", root, f"model.image.arch={arch}"))


@pytest.mark.parametrize("arch", ["convnext_tiny", "swin_tiny_patch4_window7_224"])
def test_towers_of_another_kind_are_no_fault_of_the_options(arch: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model\.image\.arch: must be a vision transformer .*, got {arch}"):
        build_task(config_of("baseline", root, f"model.image={{arch: {arch}, pretrained: false}}"))
