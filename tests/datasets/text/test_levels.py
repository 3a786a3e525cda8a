"""Texts of three levels: candidates for words and phrases, and uniform draws among them."""

import json
from collections import Counter

import numpy as np
import pytest

from datasets.text.levels import LEVELS, attribute_words, clause_candidates, phrase_candidates, text_of_level
from tests.helpers.configs import GOLDEN

CAPTIONS = json.loads((GOLDEN / "ivt_text.json").read_text())["captions"]


@pytest.mark.parametrize("entry", CAPTIONS, ids=lambda entry: entry["caption"][:24])
def test_candidates_are_the_authors(entry: dict) -> None:
    caption = entry["caption"].lower()
    assert phrase_candidates(caption) == entry["phrase_candidates"]
    assert phrase_candidates(caption, strip_brackets=False) == entry["cuhk_fallback_word_candidates"]
    assert clause_candidates(caption) == entry["icfg_word_candidates"] == entry["rstp_word_candidates"]


def test_commas_around_the_other_clauses_go() -> None:
    assert phrase_candidates(",the longest clause of all, short one,") == ["the longest clause of all", "short one"]


def draws(caption: str, level: str, attributes=None, number: int = 400) -> Counter[str]:
    rng = np.random.default_rng(0)
    return Counter(text_of_level(caption, level, rng, attributes) for _ in range(number))


def test_each_candidate_is_drawn_as_often_as_the_others() -> None:
    caption = "The man wears a grey suit, and a black hat. He holds a phone."
    assert draws(caption, "sentence") == {caption.lower(): 400}
    for level in ("word", "phrase"):
        drawn = draws(caption, level)
        assert set(drawn) == set(LEVELS[level](caption.lower())) and len(drawn) == 3
        assert min(drawn.values()) > 100


@pytest.mark.parametrize("caption", ["", "...", "[]", "a, b. c", "no"])
def test_a_caption_without_candidates_stands_for_itself(caption: str) -> None:
    for level in LEVELS:
        for attributes in (None, {}, {"colour": ""}):
            assert draws(caption, level, attributes, 5) == {caption.lower(): 5}


def test_words_of_attributes() -> None:
    attributes = {"top": "Red shirt", "bottom": "jeans", "bag": "black bag"}
    drawn = draws("A caption, that is not used.", "word", attributes)
    sizes = Counter(len(text.split(",")) for text in drawn.elements())
    assert set(sizes) == {1, 2, 3} and min(sizes.values()) > 90
    assert set(",".join(drawn).split(",")) == {"red shirt", "jeans", "black bag"}
    assert all(len(set(text.split(","))) == len(text.split(",")) for text in drawn)
    assert set(draws("[one clause here, and more of it]", "word", {})) == {"[one clause here", "and more of it]"}
    assert attribute_words({"top": "red"}, np.random.default_rng(0)) == "red"
