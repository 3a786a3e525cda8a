"""Captions as a shared transformer reads them: BERT's embeddings, and its feed-forward weights to start from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertEmbeddings

from model.encoders.towers import BAD_OPTIONS, known_options, no_weights, reason
from utils.errors import ConfigError
from utils.registry import did_you_mean

WORD_ARCHS = ("bert", "bert-base-uncased", "google-bert/bert-base-uncased")  # that need no network: BertConfig's sizes


@dataclass(frozen=True)
class WordOptions:
    """Caption embeddings."""

    arch: str = "google-bert/bert-base-uncased"  # a BERT of the hub, a local folder of one, or `bert`
    pretrained: bool = True  # start from the weights of this name
    options: dict[str, Any] = field(default_factory=dict)  # of transformers' BertConfig


def build_words(width: int, text_length: int, options: WordOptions) -> BertEmbeddings:
    """Fresh word, position and type embeddings; raises `ConfigError` where they do not fit the transformer."""
    config = _config_of(width, options)
    if config.hidden_size != width:
        raise ConfigError(
            f"model.text: {options.arch} has {config.hidden_size} dimensions, the vision transformer {width}"
        )
    if config.max_position_embeddings < text_length:
        raise ConfigError(
            f"data.text_length: {text_length} tokens, but the embeddings have "
            f"{config.max_position_embeddings} positions (model.text)"
        )
    try:
        words = BertEmbeddings(config)
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build them: {reason(error)}") from None
    for embedding in (words.word_embeddings, words.position_embeddings, words.token_type_embeddings):
        nn.init.trunc_normal_(embedding.weight, std=0.02)
    with torch.no_grad():
        words.word_embeddings.weight[config.pad_token_id].zero_()
    return words


def load_text_mlps(words: BertEmbeddings, blocks: Iterable[nn.Module], options: WordOptions) -> None:
    """Put BERT's embeddings into `words`, and its feed-forward weights into the blocks' `text_mlp` (spec 1.3).

    BERT's attention and norms have no place: captions run through the vision transformer's.
    """
    try:
        bert, loaded = BertModel.from_pretrained(
            options.arch, add_pooling_layer=False, output_loading_info=True, **options.options
        )
    except OSError as error:
        raise no_weights("text", options.arch, error) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text: {options.arch} cannot be loaded with these options: {reason(error)}") from None
    if loaded["missing_keys"]:  # transformers lets them start fresh
        raise ConfigError(
            f"model.text.arch: {options.arch} is no BERT: {len(loaded['missing_keys'])} of its tensors are missing, "
            f"for instance {min(loaded['missing_keys'])}"
        )
    blocks = list(blocks)
    layers = bert.encoder.layer
    if len(layers) < len(blocks) or layers[0].intermediate.dense.weight.shape != blocks[0].text_mlp.fc1.weight.shape:  # type: ignore[union-attr]
        raise ConfigError(
            f"model.text.arch: {options.arch} has {len(layers)} layers of {bert.config.intermediate_size} hidden "
            f"units, the vision transformer {len(blocks)} of {blocks[0].text_mlp.fc1.out_features}"  # type: ignore[union-attr]
        )
    words.load_state_dict(bert.embeddings.state_dict())
    for block, layer in zip(blocks, layers, strict=False):
        block.text_mlp.fc1.load_state_dict(layer.intermediate.dense.state_dict())  # type: ignore[union-attr]
        block.text_mlp.fc2.load_state_dict(layer.output.dense.state_dict())  # type: ignore[union-attr]


def _config_of(width: int, options: WordOptions) -> BertConfig:
    known_options(BertConfig(), options.options)
    try:
        if options.arch in WORD_ARCHS and not options.pretrained:
            return BertConfig(**{"hidden_size": width, **options.options})
        return BertConfig.from_pretrained(options.arch, **options.options)
    except OSError as error:
        if options.pretrained:
            raise no_weights("text", options.arch, error) from None
        raise ConfigError(
            f"model.text.arch: unknown '{options.arch}' (no folder of this name, and not in the hub's cache); "
            f"{did_you_mean(options.arch, WORD_ARCHS)}"
        ) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build them: {reason(error)}") from None
