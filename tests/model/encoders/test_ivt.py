"""IVT's encoder: masking of tokens, sources of the weights, bad options."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.schema import load_config
from model.build import build_encoder, build_task
from model.checkpoints.grids import resize_position_grid
from model.encoders import Encoder
from model.encoders.ivt import IVTEncoder
from processor.resolve import resolve
from tests.helpers.checkpoints import ivt_sources
from tests.helpers.configs import ROOT, TINY_IVT
from utils.errors import ConfigError

CONFIG = ROOT / "configs/ivt.yaml"


# --- masking ----------------------------------------------------------------------------------------------------------


def token_counts(encoder: Encoder, steps: int, batch: int = 2, length: int = 20) -> dict[str, list[int]]:
    """Number of tokens that enter the first block in each training step."""
    assert isinstance(encoder, IVTEncoder)
    seen: list[int] = []
    encoder.train().trunk.blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    images, ids = torch.zeros(batch, 3, *encoder.image_size), torch.ones(batch, length, dtype=torch.int64)
    for _ in range(steps):
        encoder.encode_image(images)
        encoder.encode_text(ids)
    return {"image": seen[::2], "text": seen[1::2]}


def tiny_ivt(*overrides: str) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(load_config(CONFIG, [*TINY_IVT, *overrides]))


def test_masking_removes_zero_to_a_fifth_of_the_tokens_and_their_work() -> None:
    counts = token_counts(tiny_ivt(), steps=150)
    patches = 1 + 4 * 2  # 64x32 in patches of 16
    assert set(counts["image"]) == {patches, patches - 1}
    assert set(counts["text"]) == {20, 19, 18, 17, 16}
    assert counts["image"].count(patches) == pytest.approx(75, abs=25)
    both = list(zip(counts["image"], counts["text"], strict=True))
    assert len(set(both)) == 10  # drawn independently


def test_without_masking_or_in_evaluation_all_tokens_are_there() -> None:
    assert set(token_counts(tiny_ivt("model.mask_ratio=0"), steps=20)["text"]) == {20}
    encoder = tiny_ivt("model.mask_ratio=0.9").eval()
    ids = torch.ones(2, 20, dtype=torch.int64)
    torch.testing.assert_close(encoder.encode_text(ids).tokens, encoder.encode_text(ids).tokens, rtol=0, atol=0)
    assert encoder.encode_text(ids).tokens.shape[1] == 20


@pytest.mark.parametrize("per_sample", [False, True])
def test_positions_are_shared_by_the_batch_or_drawn_for_each(per_sample: bool) -> None:
    encoder = tiny_ivt("model.mask_ratio=0.5", f"model.mask_per_sample={str(per_sample).lower()}")
    assert isinstance(encoder, IVTEncoder)
    for _ in range(20):
        kept = encoder._draw_kept(6, 40)
        assert kept.shape[0] == (6 if per_sample else 1) and 20 <= kept.shape[1] <= 40
        assert (kept[:, 0] == 0).all()  # the first token is always kept, in first place
        for row in kept.tolist():
            assert len(set(row)) == len(row) and set(row) <= set(range(40))
        if per_sample and kept.shape[1] < 40:
            assert len({frozenset(row) for row in kept.tolist()}) > 1


# --- sources of the weights -------------------------------------------------------------------------------------------


def test_every_weight_is_the_one_of_its_source(tmp_path: Path) -> None:
    vit, bert, options = ivt_sources(tmp_path)
    encoder = build_encoder(load_config(CONFIG, options))
    own, image, text = encoder.state_dict(), vit.state_dict(), bert.state_dict()
    expected: dict[str, Tensor] = {}
    for name, value in image.items():
        if not name.startswith("head."):
            expected[f"trunk.{name}"] = value
    expected["trunk.pos_embed"] = resize_position_grid(image["pos_embed"], (5, 2))  # (64 - 16) // 12 + 1, ...
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        for kind in ("weight", "bias"):
            if f"embeddings.{name}.{kind}" in text:
                expected[f"words.{name}.{kind}"] = text[f"embeddings.{name}.{kind}"]
    for block in range(2):
        for mlp, dense in (("fc1", "intermediate.dense"), ("fc2", "output.dense")):
            for kind in ("weight", "bias"):
                theirs = text[f"encoder.layer.{block}.{dense}.{kind}"]
                expected[f"trunk.blocks.{block}.text_mlp.{mlp}.{kind}"] = theirs
    assert own.keys() - expected.keys() == {"type_embed"}  # no source: normal, std 0.02
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, msg=name)
    assert float(own["type_embed"].std()) == pytest.approx(0.02, rel=0.2)


def test_without_the_hub_the_missing_weights_are_named() -> None:
    small = "model.image={arch: vit_base_patch16_224, pretrained: false, options: {depth: 1}}"
    words = "model.text={arch: bert, pretrained: false}"
    message = r"model\.image\.arch: cannot get the weights of vit_base_patch16_224\.orig_in21k"
    with pytest.raises(ConfigError, match=message):
        build_encoder(load_config(CONFIG, [words]))
    with pytest.raises(
        ConfigError, match=r"model\.text\.arch: cannot get the weights of google-bert/bert-base-uncased"
    ):
        build_encoder(load_config(CONFIG, [small]))
    build_encoder(load_config(CONFIG, [small]), pretrained=False)  # as test.py builds it


# --- options ----------------------------------------------------------------------------------------------------------


MISTAKES = {
    "model.mask_ratio=1": r"model\.mask_ratio: must be at least 0 and below 1, got 1",
    "model.drop_path=-0.1": r"model\.drop_path: must be at least 0",
    "model.temperature=0": r"model\.temperature: must be above 0",
    "model.embed_dim=64": r"model\.embed_dim: ivt has no such option",
    "model.text.options.hiden_size=2": r"model\.text\.options\.hiden_size: unknown key; did you mean 'hidden_size'",
    "model.text.options.vocab_size=abc": r"model\.text\.options\.vocab_size: must be an integer",
    "model.text.options.vocab_size=0": r"model\.text\.options\.vocab_size: must be from 1 to",
    "model.text.options.type_vocab_size=-1": r"model\.text\.options\.type_vocab_size: must be from 1 to",
    "model.text.arch=brt": r"model\.text\.arch: unknown 'brt'",
    "model.image.arch=vit_base_patch16_siglip_224": r"model\.image\.arch: must have a class token",
    "losses.mlm={}": r"losses\.mlm: needs all tokens, but .*set model\.mask_ratio=0",
    "losses.efa={}": r"losses\.efa: needs all tokens, but .*set model\.mask_ratio=0",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_name_their_path(override: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        build_task(resolve(load_config(CONFIG, [*TINY_IVT, override])), num_pids=3)
