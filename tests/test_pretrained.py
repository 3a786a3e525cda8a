"""Pretrained towers, from small checkpoints that the test saves in the libraries' own formats."""

from pathlib import Path

import pytest
import timm
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from configs.schema import load_config
from model.encoders import Encoder
from model.encoders.clip import resize_position_grid
from model.task import build_encoder
from tests.conftest import ARCH, ROOT, TINY
from utils.errors import ConfigError

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
