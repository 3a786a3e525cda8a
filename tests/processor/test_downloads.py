"""Everything that a config needs from the hub is listed at once, with where it is published and what replaces it."""

from pathlib import Path

import pytest

from configs.schema import load_config
from datasets.text import tokenizers
from processor.downloads import require_downloads
from tests.helpers.configs import CONFIGS, TINY
from utils.errors import ConfigError

HUB = "published at https://huggingface.co/"
IMAGE = f"model.image.arch: weights vit_base_patch16_clip_quickgelu_224.openai, {HUB}timm/vit_base_patch16_clip_224"
TEXT = f"model.text.arch: weights openai/clip-vit-base-patch16, {HUB}openai/clip-vit-base-patch16 (model"
TOKENIZER = f"data.tokenizer: tokenizer, {HUB}openai/clip-vit-base-patch16 (tokenizer.json"


def message_of(name: str, *overrides: str, weights: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        require_downloads(load_config(CONFIGS / f"{name}.yaml", overrides), weights=weights)
    return str(caught.value)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No installed package with CLIP's merges."""
    monkeypatch.setattr(tokenizers, "installed_merges", lambda: None)


def test_all_missing_files_are_one_error(bare: None) -> None:
    message = message_of("irra")
    keys = "model.image.arch, model.text.arch, data.tokenizer"
    assert message.startswith(f"{keys}: cannot get the weights and the tokenizer from the hub or its cache (HF_")
    for part in (IMAGE, TEXT, TOKENIZER, "init.path=ViT-B-16.pt", "model.image.pretrained=FILE", "cuhk_small.yaml"):
        assert part in message
    assert "https://openaipublic.azureedge.net/clip/models/" in message
    assert "data.tokenizer=bpe_simple_vocab_16e6.txt.gz: https://github.com/openai/CLIP/" in message
    assert message.count("  hf download ") == 2


def test_what_is_local_or_replaced_is_not_listed(bare: None, tmp_path: Path) -> None:
    start = ["init.path=x.pt"]
    for message in (message_of("irra", *start), message_of("irra", weights=False)):
        assert (
            message.startswith("data.tokenizer: cannot get the tokenizer from")
            and TOKENIZER in message
            and "model." not in message
        )
    message = message_of("irra", "model.image.pretrained=false", "data.tokenizer=captions")
    assert TEXT in message and IMAGE not in message and TOKENIZER not in message
    message = message_of("ivt", f"model.text.arch={tmp_path}")
    assert "timm/vit_base_patch16_224" in message and "data.tokenizer=vocab.txt" in message
    assert "model.text" not in message and "ViT-B-16.pt" not in message
    require_downloads(load_config(CONFIGS / "irra.yaml", TINY))
    require_downloads(load_config(CONFIGS / "cuhk_small.yaml"))


def test_merges_of_an_installed_package_replace_clips_tokenizer() -> None:
    assert TOKENIZER not in message_of("irra")  # open_clip is a requirement of the tests
    assert "google-bert/bert-base-uncased" in message_of("ivt", "init.path=x.pt")
