"""CLIP's byte-pair tokenizer with a mask token, and BERT's WordPiece, from a hub name, a local folder or a file."""

import gzip
import html
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ftfy
import torch
from ftfy.fixes import fix_surrogates
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from datasets.text.merges import OPENAI, installed_merges
from utils.errors import ConfigError, first_line
from utils.hub import Published, fetch, is_cached

LEARNT = "captions"  # value of data.tokenizer: learn one from the training captions
START, END, MASK = "<|startoftext|>", "<|endoftext|>", "<|mask|>"
END_OF_WORD = "</w>"
CLIP_MERGES = 48_894  # number of merges that CLIP uses; the file has a header line and more merges
TRIAL = "A man in a grey shirt \u00e9 \u6f22"
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # captions are encoded one by one in forked workers


class TextTokenizer(Protocol):
    """Captions -> token ids, 0 = padding."""

    kind: ClassVar[str]

    @property
    def text_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, caption: str) -> Tensor:
        """int64 (text_length,)."""

    def length(self, caption: str) -> int:
        """Number of tokens of the uncut caption, start and end included."""


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's tokenizer, with the entry of its last merge replaced by a mask token.

    The vocabulary has 256 byte symbols, the same symbols at the end of a word, one entry per merge except the last,
    then mask, start and end of text (anosorae/IRRA@cfc2378:utils/simple_tokenizer.py:SimpleTokenizer). The last merge
    itself is dropped as well. Its word ("jekyll" in CLIP) is split into pieces, where the published code stops with a
    KeyError.

    Args:
        merges: byte-pair merges in order.
        text_length: tokens of an encoded caption, start and end included.
    """

    kind: ClassVar[str] = "clip"
    merges: Sequence[tuple[str, str]]
    text_length: int
    vocab_size: int = field(init=False)
    mask_id: int = field(init=False)
    _tokenizer: Tokenizer = field(init=False, repr=False, compare=False)
    _lengths: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        kept = list(self.merges[:-1])
        vocab = vocabulary(kept)
        model = models.BPE(vocab=vocab, merges=kept, end_of_word_suffix=END_OF_WORD)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizer()
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (MASK, START, END)])
        object.__setattr__(self, "_tokenizer", tokenizer)  # sets a field of a frozen dataclass
        object.__setattr__(self, "mask_id", len(vocab))
        object.__setattr__(self, "vocab_size", len(vocab) + 3)

    def encode(self, caption: str) -> Tensor:
        """Encode as int64 (text_length,): start, tokens, end, zeros. A longer caption is cut before its end token."""
        start, end = self.mask_id + 1, self.mask_id + 2
        tokens = [start, *self._tokenizer.encode(clean(caption)).ids, end][: self.text_length]
        tokens[-1] = end
        ids = torch.zeros(self.text_length, dtype=torch.int64)
        ids[: len(tokens)] = torch.tensor(tokens)
        return ids

    def length(self, caption: str) -> int:
        """Number of tokens of the uncut caption; words are counted once, since most occur often."""
        return 2 + sum(_length(word, self._tokenizer, self._lengths) for word in clean(caption).split())


def _length(word: str, tokenizer: Tokenizer, known: dict[str, int]) -> int:
    if (length := known.get(word)) is None:
        length = known[word] = len(tokenizer.encode(word, add_special_tokens=False).ids)
    return length


@dataclass(frozen=True)
class WordPieceTokenizer:
    """BERT's word pieces behind [CLS], without [SEP] (docs/methods/ivt.md#wordpiece-tokens)."""

    kind: ClassVar[str] = "wordpiece"
    backend: Tokenizer = field(repr=False, compare=False)
    text_length: int
    _lengths: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return max(self.backend.get_vocab().values()) + 1  # a hand-made vocabulary may leave out ids

    def encode(self, caption: str) -> Tensor:
        """Encode as int64 (text_length,): [CLS], tokens, zeros. A longer caption is cut, unlike in IVT's code."""
        pieces = self.backend.encode(fix_surrogates(caption), add_special_tokens=False).ids
        tokens = [self.backend.token_to_id("[CLS]"), *pieces][: self.text_length]
        ids = torch.zeros(self.text_length, dtype=torch.int64)
        ids[: len(tokens)] = torch.tensor(tokens)
        return ids

    def length(self, caption: str) -> int:
        """Number of tokens of the uncut caption."""
        return 1 + sum(_length(word, self.backend, self._lengths) for word in fix_surrogates(caption).split())


def encode_all(tokenizer: TextTokenizer, captions: Sequence[str]) -> Tensor:
    """Encode captions as int32 (N, text_length), half the memory of `encode`'s."""
    if not captions:
        return torch.empty(0, tokenizer.text_length, dtype=torch.int32)
    return torch.stack([tokenizer.encode(caption).int() for caption in captions])


def clean(caption: str) -> str:
    """CLIP's text clean-up: fix encodings, resolve HTML entities twice, collapse spaces, lower the case."""
    if caption.isascii() and caption.isprintable() and "&" not in caption:  # nothing to fix, in a tenth of the time
        return " ".join(caption.split()).lower()
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(text.split()).lower()


def build_tokenizer(name_or_path: str, text_length: int) -> TextTokenizer:
    """Build a tokenizer from a hub name, a Hugging Face folder, CLIP's merges file or BERT's vocabulary file.

    Args:
        name_or_path: for instance `openai/clip-vit-base-patch16`, `google-bert/bert-base-uncased`, `data/tokenizer`, or
            the path of `bpe_simple_vocab_16e6.txt.gz` or of BERT's `vocab.txt`.
        text_length: tokens of an encoded caption, start and end included.

    Raises:
        ConfigError: there is no such tokenizer, it is neither CLIP's nor BERT's kind, or it is damaged.
    """
    try:
        tokenizer = _built(name_or_path, text_length)
        tokenizer.encode(TRIAL)
        return tokenizer
    except ConfigError:
        raise
    except BaseException as error:
        if not _is_of_library(error):
            raise
        raise ConfigError(
            f"data.tokenizer: damaged, got '{name_or_path}' ({first_line(error)}); copy it again"
        ) from None


def _built(name_or_path: str, text_length: int) -> TextTokenizer:
    path = Path(name_or_path)
    if path.is_file():
        lines = _lines(path)
        return (
            WordPieceTokenizer(_word_pieces(path, lines), text_length)
            if "[CLS]" in lines
            else ClipTokenizer(_merges_of_file(path, lines), text_length)
        )
    if copy := merges_in_place_of(name_or_path):
        return ClipTokenizer(_merges_of_file(copy, _lines(copy)), text_length)
    backend = _hugging_face(name_or_path)
    model = json.loads(backend.to_str())["model"]
    if model["type"] == "WordPiece" and model["vocab"].get("[PAD]") == 0 and "[CLS]" in model["vocab"]:
        return WordPieceTokenizer(backend, text_length)
    return ClipTokenizer(_merges(model, name_or_path), text_length)


def published_tokenizer(name_or_path: str | None) -> Published | None:
    """Files of a tokenizer on the hub; None for local ones, and if an installed package has CLIP's merges."""
    if name_or_path in (None, LEARNT) or Path(name_or_path).exists() or merges_in_place_of(name_or_path):
        return None
    return _published(name_or_path)


def merges_in_place_of(name: str) -> Path | None:
    """CLIP's merges in an installed package, if `name` is OpenAI's tokenizer on the hub and not in its cache."""
    absent = name.startswith(OPENAI) and not is_cached(_published(name))
    return installed_merges() if absent else None


def _published(name: str) -> Published:
    files = (("tokenizer.json", "vocab.json", "vocab.txt"), ("tokenizer_config.json", "config.json"))
    return Published("data.tokenizer", "tokenizer", name, files)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """CLIP's split of a text into words, and of words into byte symbols."""
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token -> id. CLIP orders the byte symbols by code point."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate(tokens)}


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            return file.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"data.tokenizer: must be a readable text file, got {path} ({error})") from None


def _word_pieces(path: Path, lines: list[str]) -> Tokenizer:
    """BERT's uncased tokenizer with a vocabulary of one token per line."""
    vocab = {token: number for number, token in enumerate(line for line in lines if line)}
    if vocab.get("[PAD]") != 0 or "[UNK]" not in vocab:
        raise ConfigError(f"data.tokenizer: a BERT vocabulary must start with [PAD] and contain [UNK], got {path}")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _is_of_library(error: BaseException) -> bool:
    """True for an error of the tokenizers library: a bare exception, or a panic of Rust, which is none of Python's."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _merges_of_file(path: Path, lines: list[str]) -> list[tuple[str, str]]:
    merges = [tuple(line.split()) for line in lines[1 : CLIP_MERGES + 1] if line.strip()]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ConfigError(f"data.tokenizer: must be a file of byte-pair merges, two symbols per line, got {path}")
    if len(merges) < CLIP_MERGES:
        raise ConfigError(
            f"data.tokenizer: must have {CLIP_MERGES} merges like CLIP, got {len(merges)} in {path}; cut short?"
        )
    return merges  # type: ignore[return-value]


def _hugging_face(name_or_path: str) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import

    try:
        load = partial(AutoTokenizer.from_pretrained, name_or_path, trust_remote_code=False)
        backend: Tokenizer = fetch(_published(name_or_path), load).backend_tokenizer
        return backend
    except BaseException as error:
        if not _is_of_library(error):
            raise
        if "custom code" in str(error):
            raise ConfigError(
                f"data.tokenizer: must be a tokenizer without custom code, got '{name_or_path}', whose code is never "
                "run; remove auto_map from its tokenizer_config.json and config.json if it has a tokenizer.json"
            ) from None
        reason = first_line(error)
        raise ConfigError(
            f"data.tokenizer: no tokenizer '{name_or_path}' found ({reason}); set it to a hub name such as "
            "openai/clip-vit-base-patch16 (needs a network or the hub's cache), a local folder of a Hugging Face "
            "tokenizer, or the path of CLIP's bpe_simple_vocab_16e6.txt.gz"
        ) from None


def _merges(model: Mapping[str, Any], name_or_path: str) -> list[tuple[str, str]]:
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", [])]
    built = vocabulary(merges)
    if not merges or any(model["vocab"].get(token) != number for token, number in built.items()):
        raise ConfigError(f"data.tokenizer: must be a byte-pair tokenizer of CLIP's kind, got '{name_or_path}'")
    return merges
