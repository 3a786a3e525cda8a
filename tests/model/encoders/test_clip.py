"""CLIP's encoder: cut captions, and towers that pool with attention."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoints.grids import resize_position_grid
from model.task import RetrievalTask
from tests.helpers.checkpoints import saved_vit
from tests.helpers.golden import golden_batch, golden_task
from tests.helpers.tasks import tiny_encoder


@pytest.fixture
def task(model_golden: dict[str, np.ndarray]) -> RetrievalTask:
    return golden_task(model_golden)


def test_text_cut_to_the_longest_caption_gives_the_same_features(
    task: RetrievalTask, model_golden: dict[str, np.ndarray]
) -> None:
    ids = golden_batch(model_golden)["caption_ids"][1:]  # row 0 fills the context
    length = int(ids.any(dim=0).nonzero().max()) + 1
    assert length < ids.shape[1]
    whole, cut = task.encode_text(ids), task.encode_text(ids[:, :length])
    torch.testing.assert_close(cut.embedding, whole.embedding, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.tokens, whole.tokens[:, :length], rtol=0, atol=1e-5)


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
    assert "set data.image_mean=[0.5, 0.5, 0.5] data.image_std=[0.5, 0.5, 0.5]" in normalised
    resized = tiny_encoder(image).state_dict()["image.trunk.pos_embed"]
    torch.testing.assert_close(resized, resize_position_grid(source.pos_embed, (4, 2), prefix=0))
