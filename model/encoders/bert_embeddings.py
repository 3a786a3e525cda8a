"""BERT's embeddings for captions, and its feed-forward weights as initial text MLPs of a shared transformer."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertEmbeddings

from model.encoders.published import no_weights, reason, text_config
from model.encoders.towers import BAD_OPTIONS, NO_CODE, known_options, pretrained_text
from utils.errors import ConfigError
from utils.hub import fetch
from utils.options import option
from utils.registry import did_you_mean

WORD_ARCHS = ("bert", "bert-base-uncased", "google-bert/bert-base-uncased")  # BertConfig's sizes, without a network


@dataclass(frozen=True)
class WordOptions:
    """Caption embeddings."""

    arch: str = option(
        "google-bert/bert-base-uncased", path=True, help="BERT of the hub, a local folder of one, or bert"
    )
    pretrained: bool = option(True, help="load the weights of this name")
    options: dict[str, Any] = option({}, help="arguments for transformers' BertConfig")


def build_words(width: int, text_length: int, options: WordOptions) -> BertEmbeddings:
    """Randomly initialised word, position and type embeddings; raises `ConfigError` if they do not fit."""
    config = _config_of(width, options)
    if config.hidden_size != width:
        raise ConfigError(
            f"model.text.arch: must have {width} dimensions like the vision transformer, got {config.hidden_size} "
            f"({options.arch})"
        )
    if config.max_position_embeddings < text_length:
        raise ConfigError(
            f"data.text_length: must be at most {config.max_position_embeddings}, the positions of the embeddings "
            f"(model.text), got {text_length}"
        )
    try:
        words = BertEmbeddings(config)
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build {options.arch} ({reason(error)})") from None
    for embedding in (words.word_embeddings, words.position_embeddings, words.token_type_embeddings):
        nn.init.trunc_normal_(embedding.weight, std=0.02)
    with torch.no_grad():
        words.word_embeddings.weight[config.pad_token_id].zero_()
    return words


def load_text_mlps(words: BertEmbeddings, blocks: Iterable[Any], options: WordOptions) -> None:
    """Load BERT's embeddings into `words`, and its feed-forward weights into the blocks' `text_mlp`.

    BERT's attention and norms are not used, because captions run through those of the vision transformer.

    Args:
        words: embeddings to load into.
        blocks: blocks of the vision transformer, each with a `text_mlp`.
        options: options of the embeddings.
    """
    settings = {"add_pooling_layer": False, "output_loading_info": True, **options.options}
    bert, loaded = pretrained_text(BertModel.from_pretrained, options.arch, settings)
    if loaded["missing_keys"]:  # transformers would initialise them afresh
        raise ConfigError(
            f"model.text.arch: must be a BERT, got {options.arch}, which lacks {len(loaded['missing_keys'])} tensors, "
            f"for instance {min(loaded['missing_keys'])}"
        )
    mlps = [block.text_mlp for block in blocks]
    layers = list(bert.encoder.layer)
    hidden, needed = bert.config.intermediate_size, mlps[0].fc1.out_features
    if len(layers) < len(mlps) or hidden != needed or bert.config.hidden_size != mlps[0].fc1.in_features:
        raise ConfigError(
            f"model.text.arch: must have {len(mlps)} layers of {needed} hidden units like the vision transformer, "
            f"got {len(layers)} of {hidden} ({options.arch})"
        )
    words.load_state_dict(bert.embeddings.state_dict())
    for mlp, layer in zip(mlps, layers, strict=False):
        mlp.fc1.load_state_dict(layer.intermediate.dense.state_dict())
        mlp.fc2.load_state_dict(layer.output.dense.state_dict())


def _config_of(width: int, options: WordOptions) -> BertConfig:
    known_options(BertConfig(), options.options)
    try:
        if options.arch in WORD_ARCHS and not options.pretrained:
            return BertConfig(**{"hidden_size": width, **options.options})
        load = partial(BertConfig.from_pretrained, options.arch, **NO_CODE, **options.options)
        return fetch(text_config(options.arch), load)
    except OSError as error:
        if options.pretrained:
            raise no_weights("text", options.arch, error) from None
        raise ConfigError(
            f"model.text.arch: unknown '{options.arch}', neither a folder nor in the hub's cache; "
            f"{did_you_mean(options.arch, WORD_ARCHS)}"
        ) from None
    except BAD_OPTIONS as error:
        raise ConfigError(f"model.text.options: transformers cannot build {options.arch} ({reason(error)})") from None
