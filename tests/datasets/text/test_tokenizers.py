"""Tokenizers: CLIP's reference ids from every source, WordPiece, and clear errors without a vocabulary."""

import gzip
import html
import json
import pickle
from pathlib import Path

import ftfy
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import DataConfig
from datasets.loaders import data_tokenizer
from datasets.text.learning import learn_merges, train_tokenizer
from datasets.text.tokenizers import ClipTokenizer, build_tokenizer, clean
from tests.helpers.configs import GOLDEN
from tests.helpers.fuzzing import FUZZ
from utils.errors import ConfigError

MERGES_FILE = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
CORPUS = [f"A man wearing a grey shirt and {n} black bags. The woman's dress is red." for n in range(50)]


@pytest.fixture(scope="module")
def clip_tokenizer() -> ClipTokenizer:
    return build_tokenizer(str(MERGES_FILE), 77)


def golden_captions() -> list[dict]:
    return json.loads((GOLDEN / "tokenizer.json").read_text())["captions"]


def test_every_golden_caption_is_encoded_as_the_authors_do(clip_tokenizer: ClipTokenizer) -> None:
    compared = 0
    for entry in golden_captions():
        if "ids" in entry:
            assert clip_tokenizer.encode(entry["caption"]).tolist() == entry["ids"], entry["caption"]
            compared += 1
    assert compared >= 20


def test_special_ids_are_the_authors(clip_tokenizer: ClipTokenizer) -> None:
    meta = json.loads((GOLDEN / "tokenizer.json").read_text())["meta"]
    assert (clip_tokenizer.vocab_size, clip_tokenizer.mask_id) == (meta["vocab_size"], meta["mask"])


def test_short_lengths_are_cut_with_the_end_token_kept() -> None:
    for entry in json.loads((GOLDEN / "tokenizer.json").read_text())["short_lengths"]:
        assert build_tokenizer(str(MERGES_FILE), entry["text_length"]).encode(entry["caption"]).tolist() == entry["ids"]


def test_the_word_whose_entry_the_mask_took_falls_into_pieces(clip_tokenizer: ClipTokenizer) -> None:
    failing = [entry["caption"] for entry in golden_captions() if "reference_error" in entry]
    assert any("jekyll" in caption.lower() for caption in failing)
    for caption in failing:
        ids = clip_tokenizer.encode(caption)
        assert clip_tokenizer.mask_id not in ids
        assert ids.max() == clip_tokenizer.mask_id + 2


def test_a_hugging_face_folder_gives_the_same_ids(clip_tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokens = open_clip.tokenizer.SimpleTokenizer()
    (tmp_path / "vocab.json").write_text(json.dumps({**tokens.encoder}).replace("<start_of_text>", "<|startoftext|>"))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = 49406, 49407
    vocab = {token: number for token, number in vocab.items() if number < 49406 or token.startswith("<|")}
    merges = [" ".join(pair) for pair in tokens.bpe_ranks]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    folder = tmp_path / "saved"
    CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(folder)
    other = build_tokenizer(str(folder), 77)
    for entry in golden_captions():
        assert torch.equal(other.encode(entry["caption"]), clip_tokenizer.encode(entry["caption"]))


def test_a_trained_tokenizer_is_read_back_small_and_repeatable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(CORPUS, tmp_path / name, vocab_size=600)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    tokenizer = build_tokenizer(str(tmp_path / "a"), 20)
    assert tokenizer.vocab_size <= 600
    ids = tokenizer.encode("A man wearing a grey shirt")
    assert ids[0] == tokenizer.mask_id + 1 and ids.max() == tokenizer.mask_id + 2
    assert int(ids.argmax()) < 12  # words of the corpus need few tokens
    assert int((ids == 0).sum()) == 20 - int(ids.argmax()) - 1


def test_merges_do_not_depend_on_the_order_of_the_captions() -> None:
    assert learn_merges(CORPUS, vocab_size=600) == learn_merges(CORPUS[::-1], vocab_size=600)


@FUZZ
@given(text=st.text() | st.text(alphabet="aA .,\t\n&;lt'-\x1b[0m\x7f"))
def test_the_short_way_of_cleaning_changes_nothing(text: str) -> None:
    slow = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean(text) == " ".join(slow.split()).lower()


@FUZZ
@given(text=st.text() | st.text(alphabet="aA .,\t\n&;lt'-").map(lambda text: f"{text} <|endoftext|> 's it's"))
def test_lengths_are_those_of_uncut_captions(text: str, clip_tokenizer: ClipTokenizer) -> None:
    assert clip_tokenizer.length(text) == 2 + len(clip_tokenizer._tokenizer.encode(clean(text)).ids)


def test_a_tokenizer_survives_pickling(clip_tokenizer: ClipTokenizer) -> None:
    again = pickle.loads(pickle.dumps(clip_tokenizer))
    assert torch.equal(again.encode("a red coat"), clip_tokenizer.encode("a red coat"))


def test_no_tokenizer_names_all_three_ways(tmp_path: Path) -> None:
    for name in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"(?s)data\.tokenizer.*hub name.*local folder.*bpe_simple_vocab_16e6"):
            build_tokenizer(name, 77)


def test_a_file_that_holds_no_merges_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "merges.txt"
    wrong.write_text("header\nthis line has five words\n")
    with pytest.raises(ConfigError, match=r"merges\.txt"):
        build_tokenizer(str(wrong), 77)
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match=r"broken\.txt\.gz"):
        build_tokenizer(str(tmp_path / "broken.txt.gz"), 77)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"version": "1.0", "added_tok'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_folder_names_all_three_ways(name: str, content: bytes, tmp_path: Path) -> None:
    train_tokenizer(CORPUS, tmp_path / "a", vocab_size=600)
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"(?s)no tokenizer .*/a' found.*hub name.*local folder.*bpe_simple_vocab"):
        build_tokenizer(str(tmp_path / "a"), 77)


@pytest.mark.parametrize("part", [0.5, 0.02])
@pytest.mark.parametrize("packed", [True, False])
def test_a_merges_file_cut_short_is_refused(packed: bool, part: float, tmp_path: Path) -> None:
    content = MERGES_FILE.read_bytes() if packed else gzip.decompress(MERGES_FILE.read_bytes())[:400_000]
    path = tmp_path / ("merges.txt.gz" if packed else "merges.txt")
    path.write_bytes(content[: int(len(content) * part)])
    message = r"data\.tokenizer: must (be a readable text file|have 48894 merges like CLIP), got .*merges\.txt"
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(str(path), 77)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["merges"].__setitem__(3, ["qq", "zz"]),  # outside the vocabulary
        lambda model: model["merges"].__setitem__(3, model["merges"][4]),
        lambda model: model["vocab"].update(a=-4),
        lambda model: model["vocab"].update(a=5000),
        lambda model: model.update(merges=[]),
        lambda model: model.update(type="WordPiece", vocab={"[PAD]": 0, "[CLS]": 1}, unk_token="[UNK]"),
        lambda model: model.update(continuing_subword_prefix=3),
    ],
)
def test_a_hand_made_tokenizer_is_a_clear_error(change, tmp_path: Path) -> None:
    train_tokenizer(CORPUS, tmp_path / "a", vocab_size=600)
    content = json.loads((tmp_path / "a/tokenizer.json").read_text())
    change(content["model"])
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: "):
        build_tokenizer(str(tmp_path / "a"), 77)


@pytest.mark.parametrize("line", ["qqzz xxyy", "\u6f22 \u5b57", "i n"])
def test_a_merges_file_with_odd_symbols_is_damaged(line: str, tmp_path: Path) -> None:
    lines = gzip.decompress(MERGES_FILE.read_bytes()).decode().split("\n")
    lines[7] = line
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: damaged, got .*merges\.txt.*out of vocabulary"):
        build_tokenizer(str(tmp_path / "merges.txt"), 77)


def test_flipped_bits_in_a_packed_file_are_named(tmp_path: Path) -> None:
    content = bytearray(MERGES_FILE.read_bytes())
    content[5000] ^= 255
    (tmp_path / "merges.txt.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: must be a readable text file, got .*merges\.txt\.gz"):
        build_tokenizer(str(tmp_path / "merges.txt.gz"), 77)


# --- WordPiece --------------------------------------------------------------------------------------------------------


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "in", "grey", "##ish", "shirt", ",", ".", "-"]
CAPTION = "A man, in GREYISH t-shirt."
EXPECTED = [2, 5, 6, 11, 7, 8, 9, 1, 13, 10, 12]  # [CLS], no [SEP]; "t" is unknown


def bert_vocabulary(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.mark.parametrize("source", ["folder", "file"])
def test_word_pieces_begin_with_cls_and_end_without_sep(source: str, tmp_path: Path) -> None:
    folder = bert_vocabulary(tmp_path / "bert")
    tokenizer = build_tokenizer(str(folder if source == "folder" else folder / "vocab.txt"), 14)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("wordpiece", len(PIECES))
    assert tokenizer.encode(CAPTION).tolist() == [*EXPECTED, 0, 0, 0]
    assert tokenizer.encode("").tolist() == [2] + [0] * 13
    assert tokenizer.encode("\ud83d").tolist() == tokenizer.encode("\ufffd").tolist()  # half a surrogate pair
    short = build_tokenizer(str(folder if source == "folder" else folder / "vocab.txt"), 4)
    assert short.encode(CAPTION).tolist() == EXPECTED[:4]
    assert short.length(CAPTION) == len(EXPECTED) and short.length("") == 1
    assert pickle.loads(pickle.dumps(short)).encode(CAPTION).tolist() == EXPECTED[:4]  # spawned workers pickle it


def test_word_pieces_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    folder = bert_vocabulary(tmp_path / "bert")
    theirs = BertTokenizer.from_pretrained(folder)
    ours = build_tokenizer(str(folder / "vocab.txt"), 40)
    for caption in (CAPTION, "  gr\u00e9y   SHIRT\n", "greyish-grey", "in,in.in"):
        ids = theirs(caption)["input_ids"][:-1]
        assert ours.encode(caption).tolist() == ids + [0] * (40 - len(ids))


def test_an_encoder_is_not_given_tokens_that_it_does_not_understand(tmp_path: Path) -> None:
    folder = bert_vocabulary(tmp_path / "bert")
    config = DataConfig(tokenizer=str(folder))
    assert data_tokenizer(config, tmp_path, most=100, kinds=("wordpiece", "clip")).kind == "wordpiece"
    message = r"data\.tokenizer: this encoder needs a clip tokenizer, got .* which is wordpiece"
    with pytest.raises(ConfigError, match=message):
        data_tokenizer(config, tmp_path, most=100, kinds=("clip",))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: the text tower has 13 tokens .*, got a tokenizer with 14"):
        data_tokenizer(config, tmp_path, most=13, kinds=("wordpiece",))


@pytest.mark.parametrize("lines", [["[CLS]", "[PAD]", "[UNK]"], ["[PAD]", "[CLS]", "a"]])
def test_a_vocabulary_without_padding_first_or_unknown_words_is_refused(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: a BERT vocabulary must start with \[PAD\] .*vocab\.txt"):
        build_tokenizer(str(tmp_path / "vocab.txt"), 10)


def test_ids_beyond_the_vocabulary_count_as_tokens(tmp_path: Path) -> None:
    folder = bert_vocabulary(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").write_text("\n".join([*PIECES, "a", "coat"]) + "\n")  # "a" for the second time
    assert build_tokenizer(str(folder / "vocab.txt"), 8).vocab_size == len(PIECES) + 2
