"""Shared by all tests: no network, golden files, a rendered data set of a few people, towers of a few weights."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of a library that might ask the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import numpy as np
import pytest

from datasets.synthetic.render import render_dataset

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
ARCH = "vit_base_patch16_clip_quickgelu_224"

# Any shipped config at a size that a CPU trains in seconds, on the data of the `root` fixture.
TINY = [
    "data.dataset=synthetic",
    "data.image_size=[64, 32]",
    "data.tokenizer=null",
    "data.text_length=64",
    "data.batch_size=8",
    "data.workers=0",
    "model.embed_dim=64",
    f"model.image={{arch: {ARCH}, stride: null, pretrained: false}}",
    "model.image.options={embed_dim: 64, depth: 1, num_heads: 1, patch_size: 16, weight_init: jax}",
    "model.text={arch: clip, pretrained: false}",
    "model.text.options={vocab_size: 1024, hidden_size: 64, intermediate_size: 64, "
    "num_hidden_layers: 1, num_attention_heads: 1}",
    "train.epochs=1",
    "train.precision=fp32",
    "train.log_every=2",
]
# The same for IVT's configs: no projection, other towers.
TINY_IVT = [
    *(override for override in TINY if not override.startswith("model.")),
    "model.image={arch: vit_base_patch16_224, stride: null, pretrained: false}",
    "model.image.options={embed_dim: 64, depth: 1, num_heads: 1, patch_size: 16}",
    "model.text={arch: bert, pretrained: false, options: {vocab_size: 1024}}",
]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with rendered pedestrians: 8 + 3 + 4 people, 2 images each, 2 captions an image."""
    folder = tmp_path_factory.mktemp("data")
    render_dataset(folder, train_ids=8, val_ids=3, test_ids=4, images_per_id=2)
    return folder


@pytest.fixture
def tiny(root: Path, tmp_path: Path) -> list[str]:
    """Overrides that make any shipped config train in seconds, with its runs below tmp_path."""
    return [*TINY, f"data.root={root}", f"train.output={tmp_path / 'runs'}"]


@pytest.fixture(scope="session")
def irra_golden() -> dict[str, np.ndarray]:
    """Losses, masking, schedules and metrics of the authors' code (tests/golden/README.md)."""
    return dict(np.load(GOLDEN / "irra_fmfa_public.npz"))


@pytest.fixture(scope="session")
def model_golden() -> dict[str, np.ndarray]:
    """A small IRRA with its weights, inputs, outputs, gradients and four training steps."""
    return dict(np.load(GOLDEN / "irra_model_public.npz"))
