"""Checks of a data set for the config that will train: what train.py refuses at its start, and captions it cuts."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from configs.schema import Config
from datasets.annotations import Annotations, load_annotations, require_selection
from datasets.loaders import data_tokenizer
from datasets.pairs import pairs_of
from datasets.text.tokenizers import TextTokenizer
from tools.dataset_checks import Finding, Text, token_findings
from utils.errors import UserError

T = TypeVar("T")


def training_findings(
    config: Config, annotations: Annotations, texts: Sequence[Text], *, sound: bool, model: bool
) -> Iterator[Finding]:
    """Findings about the tokenizer, the splits and the batches.

    Args:
        config: config that will train.
        annotations: valid records of the data set, with paths relative to its folder.
        texts: their captions.
        sound: the annotations have no error, so that train.py reads them.
        model: check model and batches as well; otherwise the config has only data settings.
    """
    refused: list[str] = []
    whole = attempt(refused, lambda: read(config)) if sound else None
    if model:
        from processor.downloads import require_downloads

        attempt(refused, lambda: require_downloads(config))
    tokenizer = attempt([] if _names_tokenizer(refused) else refused, lambda: tokenizer_of(config, annotations))
    if tokenizer is not None:
        yield from token_findings(texts, tokenizer, config.data.text_length)
    if model and whole is not None and tokenizer is not None:
        attempt(refused, lambda: build_all(config, whole))
        yield from batch_findings(config, whole)
    for message in refused:
        first, *more = message.splitlines()
        kind = "no_tokenizer" if _names_tokenizer([first]) else "refused"
        yield Finding("error", kind, f"train.py refuses: {first}", 1, [line.strip() for line in more])


def _names_tokenizer(messages: Sequence[str]) -> bool:
    return any("data.tokenizer: " in message for message in messages)


def attempt(refused: list[str], step: Callable[[], T]) -> T | None:
    """The result of a step; its error is added to `refused`."""
    try:
        return step()
    except UserError as error:
        refused.append(str(error))
        return None


def read(config: Config) -> Annotations:
    """The data set as train.py reads it."""
    annotations = load_annotations(config.data.dataset, config.data.root, val_ids=config.carved_val_ids)
    require_selection(config, annotations)
    return annotations


def tokenizer_of(config: Config, annotations: Annotations) -> TextTokenizer:
    """The tokenizer of a config, for any encoder."""
    kinds = ("clip", "wordpiece")
    return data_tokenizer(config.data, annotations.folder, most=sys.maxsize, kinds=kinds, learn_from=annotations)


def build_all(config: Config, annotations: Annotations) -> None:
    """Build task and loaders as train.py does; pretrained weights of the hub are left out."""
    import torch

    from model.build import build_task
    from processor.inputs import build_loaders

    task = build_task(config, len(annotations.train_labels), weights=config.init.path is not None)
    build_loaders(config, annotations, task, torch.device("cpu"))


def batch_findings(config: Config, annotations: Annotations) -> Iterator[Finding]:
    """A batch that the training split cannot fill."""
    size, pairs = config.data.batch_size, len(pairs_of(annotations.train))
    if size > pairs:
        message = f"data.batch_size ({size}) is above the {pairs} training pairs: an epoch is one smaller batch"
        yield Finding("warning", "large_batch", message, 1, [])
