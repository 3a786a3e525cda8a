"""Paths, and shipped configs at a size that a CPU trains in seconds."""

from pathlib import Path

from configs.schema import Config, load_config
from processor.resolve import resolve

GOLDEN = Path(__file__).parent.parent / "golden"
ROOT = Path(__file__).parent.parent.parent
ARCH = "vit_base_patch16_clip_quickgelu_224"
# Overrides that shrink any shipped config until a CPU trains it in seconds on the `root` fixture's data.
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
# The same for IVT's configs, which have other towers and no projection.
TINY_IVT = [
    *(override for override in TINY if not override.startswith("model.")),
    "model.image={arch: vit_base_patch16_224, stride: null, pretrained: false}",
    "model.image.options={embed_dim: 64, depth: 1, num_heads: 1, patch_size: 16}",
    "model.text={arch: bert, pretrained: false, options: {vocab_size: 1024}}",
]
CONFIGS = ROOT / "configs"
RDE = ROOT / "configs/rde.yaml"
NOISE = "data.noise_rate=0.5"
METHODS: dict[str, list[str]] = {
    "baseline": [],
    "irra": [],
    "irra_clean": ["losses.mlm.clean_captions=true", "losses.id.weight=0.5"],
    "ivt": [],
    "rde": ["data.noise_rate=0.5"],
    "lcr2s": [],
    "lcr2s_joint": ["data.num_instances=2"],
}


def config_of(method: str, root: Path, *more: str) -> Config:
    """Config of a method at tiny size, with what it needs for a step on the rendered data."""
    tiny = TINY_IVT if method == "ivt" else TINY
    path = ROOT / f"configs/{method.removesuffix('_clean')}.yaml"
    return resolve(load_config(path, [*tiny, f"data.root={root}", *METHODS.get(method, []), *more]))


def tiny_config(name: str, root: Path, *overrides: str) -> Config:
    """Shipped config at tiny size on the rendered data."""
    return resolve(load_config(CONFIGS / f"{name}.yaml", [*TINY, f"data.root={root}", *overrides]))


def rde_config(root: Path, *overrides: str, config: Path = RDE) -> Config:
    """RDE's config, or another one, at tiny size on the rendered data."""
    tiny = TINY_IVT if "ivt" in config.name else TINY
    return resolve(load_config(config, [*tiny, f"data.root={root}", *overrides]))


def irra_config(tiny: list[str], *overrides: str) -> Config:
    """IRRA's config with the `tiny` fixture's overrides and these."""
    return resolve(load_config(ROOT / "configs/irra.yaml", [*tiny, *overrides]))


def write_yaml(folder: Path, name: str, text: str) -> Path:
    """Write a YAML file and return its path."""
    (folder / name).write_text(text)
    return folder / name
