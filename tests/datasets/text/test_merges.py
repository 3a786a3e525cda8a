"""CLIP's merges are found in installed packages, only if they are the published ones, without an import."""

import gzip
import sys
from pathlib import Path

import pytest

from datasets.text import merges, tokenizers
from datasets.text.merges import MERGES_FILE, SHA256, installed_merges
from datasets.text.tokenizers import build_tokenizer
from utils.integrity import file_hash


def test_the_copy_of_open_clip_is_the_published_file_and_tokenizes_like_it() -> None:
    copy = installed_merges()
    assert copy is not None and copy.name == MERGES_FILE and file_hash(copy) == SHA256
    name = build_tokenizer("openai/clip-vit-base-patch16", 77)
    assert name.vocab_size == 49408 and name == build_tokenizer(str(copy), 77)


def test_a_copy_that_differs_is_not_taken_and_no_package_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "clip"
    (package / "assets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "assets" / MERGES_FILE).write_bytes(gzip.compress(b"header\na b\n"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(merges, "PACKAGES", ("clip", "no_such_package"))
    monkeypatch.setattr(merges, "distributions", lambda: [])
    assert installed_merges.__wrapped__() is None
    (package / "assets" / MERGES_FILE).write_bytes(Path(str(installed_merges())).read_bytes())
    assert installed_merges.__wrapped__() == package / "assets" / MERGES_FILE and "clip" not in sys.modules


def test_a_package_outside_the_list_is_found_by_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "PACKAGES", ())
    assert installed_merges.__wrapped__() == installed_merges()


def test_other_names_and_cached_tokenizers_do_not_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizers.merges_in_place_of("google-bert/bert-base-uncased") is None
    assert tokenizers.merges_in_place_of("openai/clip-vit-large-patch14") == installed_merges()
    monkeypatch.setattr(tokenizers, "is_cached", lambda needed: True)
    assert tokenizers.merges_in_place_of("openai/clip-vit-large-patch14") is None
