"""Pretrained towers, from small checkpoints that the test saves in the libraries' own formats."""

from pathlib import Path

import pytest
import timm
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from configs.schema import load_config
from model.build import build_encoder
from model.encoders import Encoder
from model.encoders.towers import resize_position_grid
from tests.conftest import ARCH, ROOT, TINY
from utils.errors import CheckpointError, ConfigError

# As TINY has it.
TEXT = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "bos_token_id": 1022,
    "eos_token_id": 1023,
}


def tiny_encoder(*overrides: str, pretrained: bool = True) -> Encoder:
    return build_encoder(load_config(ROOT / "configs/baseline.yaml", [*TINY, *overrides]), pretrained=pretrained)


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
    with pytest.raises(ConfigError, match=r"model\.embed_dim: 64, but .* projects to 32 dimensions"):
        tiny_encoder(f"model.text={{arch: {folder}, pretrained: true}}")
    with pytest.raises(ConfigError, match=r"data\.text_length: 90 tokens, but the text tower has 77 positions"):
        tiny_encoder(f"model.text={{arch: {folder}, pretrained: true}}", "data.text_length=90")
    with pytest.raises(ConfigError, match=r"model\.text: .* cannot be loaded with these options"):
        tiny_encoder(f"model.text={{arch: {folder}, pretrained: true}}", "model.text.options.hidden_size=128")


def test_a_pretrained_vision_tower_is_loaded_and_its_position_grid_resized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 16}
    source = timm.create_model(ARCH, num_classes=64, **sizes)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    file = f"{{file: {tmp_path}/vit.pth, num_classes: 64}}"  # what timm's registry says of the real ones
    encoder = tiny_encoder("model.image.pretrained=true", f"model.image.options.pretrained_cfg_overlay={file}")
    loaded, expected = encoder.state_dict(), source.state_dict()
    assert loaded["image.trunk.pos_embed"].shape == (1, 1 + 4 * 2, 64)
    torch.testing.assert_close(loaded["image.trunk.pos_embed"], resize_position_grid(expected["pos_embed"], (4, 2)))
    torch.testing.assert_close(loaded["image.projection.weight"], expected["head.weight"])
    torch.testing.assert_close(loaded["image.trunk.blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])


def test_evaluating_a_run_needs_no_pretrained_weights() -> None:
    pretrained = [f"model.{tower}.pretrained=true" for tower in ("image", "text")]
    with pytest.raises(ConfigError, match=r"model\.image\.arch: the weights of .* are not in the hub's cache"):
        tiny_encoder(*pretrained)  # tests have no network
    tiny_encoder(*pretrained, pretrained=False)


def saved_vit(folder: Path, arch: str = ARCH, **options: object) -> tuple[Path, torch.nn.Module]:
    """A timm vision tower of TINY's size in a file, with all of its weights random."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 16}
    source = timm.create_model(arch, **sizes, **options).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(source.state_dict(), folder / "vit.pth")
    return folder / "vit.pth", source


def test_a_vision_tower_starts_from_a_file_of_timms(tmp_path: Path) -> None:
    file, source = saved_vit(tmp_path, num_classes=64)
    torch.save({name: value for name, value in source.state_dict().items() if name != "head.bias"}, file)
    encoder = tiny_encoder(f"model.image.pretrained={file}", "data.image_size=[224, 224]")
    images = torch.randn(2, 3, 224, 224)
    expected = source.forward_features(images) @ source.head.weight.T
    torch.testing.assert_close(encoder.encode_image(images).tokens, expected)
    assert encoder.notes == ()
    tiny_encoder(f"model.image.pretrained={file}", pretrained=False)  # as test.py has it: the file may be gone


def test_a_projection_of_another_width_starts_fresh_and_this_is_said(tmp_path: Path) -> None:
    file, source = saved_vit(tmp_path, num_classes=10)
    encoder = tiny_encoder(f"model.image.pretrained={file}")
    (note,) = encoder.notes
    assert note == f"model.image: {file} has no projection to 64 dimensions (model.embed_dim); it starts fresh"
    loaded = encoder.state_dict()
    torch.testing.assert_close(loaded["image.trunk.norm.weight"], source.state_dict()["norm.weight"])
    assert loaded["image.projection.weight"].shape == (64, 64)


def test_a_tower_that_pools_with_a_map_puts_the_pooled_token_first(tmp_path: Path) -> None:
    arch = "vit_base_patch16_siglip_224"
    file, source = saved_vit(tmp_path, arch, num_classes=0)
    image = f"model.image={{arch: {arch}, pretrained: {file}}}"
    encoder = tiny_encoder(image, "data.image_size=[224, 224]")
    images = torch.randn(2, 3, 224, 224)
    encoded = encoder.encode_image(images)
    assert encoded.tokens.shape == (2, 1 + 14 * 14, 64) and torch.equal(encoded.tokens[:, 0], encoded.embedding)
    projection = encoder.state_dict()["image.projection.weight"]
    torch.testing.assert_close(encoded.embedding, source(images) @ projection.T)
    torch.testing.assert_close(encoded.tokens[:, 1:], source.forward_features(images) @ projection.T)
    fresh, normalised = encoder.notes
    assert "no projection to 64 dimensions" in fresh
    assert "normalised by mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]: data.image_mean" in normalised
    resized = tiny_encoder(image).state_dict()["image.trunk.pos_embed"]
    torch.testing.assert_close(resized, resize_position_grid(source.pos_embed, (4, 2), prefix=0))


@pytest.mark.parametrize(
    "fault, message",
    [
        ("missing", r"vit\.pth: no such checkpoint"),
        ("deeper", r"vit\.pth: of another architecture.*missing \(blocks\.1\."),
        ("grid", r"pos_embed cannot be resized to this image size: its 5 positions are no square grid"),
        ("flat grid", r"pos_embed cannot be resized to this image size: its shape is \(64,\)"),
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
    """test.py builds the tower without the folder's weights, but it must have the folder's sizes."""
    folder = text_folder(tmp_path)
    encoder = tiny_encoder(
        f"model.text={{arch: {folder}, pretrained: true}}", "model.text.options={}", pretrained=False
    )
    assert encoder.vocab_size == 1024
    assert encoder.state_dict()["text.projection.weight"].shape == (64, 64)
