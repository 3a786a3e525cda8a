"""Byte-pair vocabularies of CLIP's kind, learnt from captions."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, trainers

from datasets.text.tokenizers import END, END_OF_WORD, START, clean, pre_tokenizer, vocabulary


def train_tokenizer(captions: Iterable[str], folder: Path, *, vocab_size: int = 1024) -> None:
    """Learn a byte-pair vocabulary of CLIP's kind and write it as a Hugging Face tokenizer.

    Args:
        captions: texts to learn from.
        folder: folder to create, for `build_tokenizer`.
        vocab_size: largest size of the vocabulary, byte symbols and special tokens included.
    """
    merges = learn_merges(captions, vocab_size=vocab_size)
    vocab = vocabulary(merges) | {START: 512 + len(merges), END: 513 + len(merges)}
    finished = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD))
    finished.pre_tokenizer = pre_tokenizer()
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(finished.to_str(pretty=True), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def learn_merges(captions: Iterable[str], *, vocab_size: int = 1024) -> list[tuple[str, str]]:
    """Learn byte-pair merges; the same captions give the same ones in any order."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=list(vocabulary([])),  # fixes their ids, which decide ties between merges
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator((clean(caption) for caption in captions), trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]
