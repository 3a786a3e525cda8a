"""CLIP's byte-pair tokenizer with a mask token, built from a hub name, a local folder or the merges file."""

import gzip
import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ftfy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from utils.errors import ConfigError

START, END, MASK = "<|startoftext|>", "<|endoftext|>", "<|mask|>"
END_OF_WORD = "</w>"
CLIP_MERGES = 48_894  # the merges file has more lines; CLIP uses this many, after one header line
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # captions are encoded one by one, in forked workers


@dataclass(frozen=True)
class ClipTokenizer:
    """Captions -> token ids, as CLIP does it, with the last merge's entry given to the mask token.

    The vocabulary is 256 byte symbols, the same ending a word, one entry per merge but the last, then mask, start
    and end of text (IRRA utils/simple_tokenizer.py:SimpleTokenizer). The dropped entry's merge is dropped too, so its
    word ("jekyll" in CLIP) falls into pieces, where the published code stops with a KeyError.
    """

    merges: Sequence[tuple[str, str]]
    text_length: int
    vocab_size: int = field(init=False)
    mask_id: int = field(init=False)
    _tokenizer: Tokenizer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kept = list(self.merges[:-1])
        vocab = _vocabulary(kept)
        model = models.BPE(vocab=vocab, merges=kept, end_of_word_suffix=END_OF_WORD)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = _pre_tokenizer()
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (MASK, START, END)])
        object.__setattr__(self, "_tokenizer", tokenizer)  # the way to set a field of a frozen dataclass
        object.__setattr__(self, "mask_id", len(vocab))
        object.__setattr__(self, "vocab_size", len(vocab) + 3)

    def encode(self, caption: str) -> Tensor:
        """int64 (text_length,): start, tokens, end, zeros. A longer caption is cut, its end token kept."""
        start, end = self.mask_id + 1, self.mask_id + 2
        tokens = [start, *self._tokenizer.encode(clean(caption)).ids, end][: self.text_length]
        tokens[-1] = end
        ids = torch.zeros(self.text_length, dtype=torch.int64)
        ids[: len(tokens)] = torch.tensor(tokens)
        return ids


def clean(caption: str) -> str:
    """CLIP's text clean-up: mend encodings, resolve HTML entities twice, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(text.split()).lower()


def build_tokenizer(name_or_path: str, text_length: int) -> ClipTokenizer:
    """The tokenizer of a Hugging Face hub name, a folder of a Hugging Face tokenizer, or CLIP's merges file.

    Args:
        name_or_path: for instance `openai/clip-vit-base-patch16`, `data/tokenizer`, or a path to
            `bpe_simple_vocab_16e6.txt.gz`.
        text_length: tokens of an encoded caption, start and end included.

    Raises:
        ConfigError: nothing of this name here, or it is no byte-pair tokenizer of CLIP's kind.
    """
    path = Path(name_or_path)
    merges = _merges_of_file(path) if path.is_file() else _merges_of_hugging_face(name_or_path)
    return ClipTokenizer(merges, text_length)


def train_tokenizer(captions: Iterable[str], folder: Path, *, vocab_size: int = 1024) -> None:
    """Learn a byte-pair vocabulary of CLIP's form and write it to `folder` as a Hugging Face tokenizer.

    Args:
        captions: the texts to learn from.
        folder: is created; `build_tokenizer(str(folder), ...)` reads it.
        vocab_size: upper bound of the finished vocabulary's size, byte symbols and special tokens included.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=list(_vocabulary([])),  # numbers them beforehand: ties between merges are decided by number
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator((clean(caption) for caption in captions), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocab = _vocabulary(merges) | {START: 512 + len(merges), END: 513 + len(merges)}
    finished = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD))
    finished.pre_tokenizer = _pre_tokenizer()
    folder.mkdir(parents=True)
    finished.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token -> id. CLIP's order of the byte symbols is that of their code points."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate(tokens)}


def _merges_of_file(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : CLIP_MERGES + 1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.tokenizer: {path} is not a readable merges file ({error})") from None
    merges = [tuple(line.split()) for line in lines if line.strip()]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ConfigError(f"data.tokenizer: {path} is not a file of byte-pair merges (two symbols on each line)")
    if len(merges) < CLIP_MERGES:
        raise ConfigError(f"data.tokenizer: {path} has {len(merges)} merges where CLIP's has {CLIP_MERGES}: cut short?")
    return merges  # type: ignore[return-value]


def _merges_of_hugging_face(name_or_path: str) -> list[tuple[str, str]]:
    from transformers import AutoTokenizer  # slow to import, and only needed here

    try:
        backend = AutoTokenizer.from_pretrained(name_or_path).backend_tokenizer
    except Exception as error:  # the tokenizers library raises bare ones, for damaged files also TypeError and such
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.tokenizer: no tokenizer '{name_or_path}' here ({reason}). Give one of: "
            "a hub name such as openai/clip-vit-base-patch16 (needs a network or the hub's cache), "
            "a local folder of a Hugging Face tokenizer, or the path of CLIP's bpe_simple_vocab_16e6.txt.gz"
        ) from None
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", [])]
    built = _vocabulary(merges)
    if not merges or any(model["vocab"].get(token) != number for token, number in built.items()):
        raise ConfigError(f"data.tokenizer: '{name_or_path}' is not a byte-pair tokenizer of CLIP's kind")
    return merges
