"""BERT's embeddings and feed-forward weights: folders that do not fit are named."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from configs.schema import load_config
from model.build import build_encoder
from tests.helpers.checkpoints import ivt_sources
from tests.helpers.configs import ROOT
from utils.errors import ConfigError

CONFIG = ROOT / "configs/ivt.yaml"


@pytest.mark.parametrize(
    "bert, message",
    [
        ({"hidden_size": 32}, r"model\.text\.arch: must have 64 dimensions .*, got 32"),
        ({"num_hidden_layers": 1}, r"model\.text\.arch: must have 2 layers of 256 hidden units .*, got 1 of 256"),
        ({"intermediate_size": 128}, r"model\.text\.arch: must have 2 layers of 256 hidden units .*, got 3 of 128"),
        ({"max_position_embeddings": 50}, r"data\.text_length: must be at most 50, .*embeddings.*, got 100"),
    ],
)
def test_a_bert_that_does_not_fit_is_named(bert: dict[str, int], message: str, tmp_path: Path) -> None:
    _, _, options = ivt_sources(tmp_path, **bert)
    with pytest.raises(ConfigError, match=message):
        build_encoder(load_config(CONFIG, options))


def test_a_folder_that_is_no_bert_is_refused(tmp_path: Path) -> None:
    _, _, options = ivt_sources(tmp_path)
    file = tmp_path / "bert/model.safetensors"
    state = load_file(file)
    save_file(
        {name: value for name, value in state.items() if "layer.1.output.dense" not in name}, file, {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"model\.text\.arch: must be a BERT, got .*bert, which lacks 2 tensors"):
        build_encoder(load_config(CONFIG, options))
