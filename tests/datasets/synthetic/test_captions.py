"""Captions of the synthetic data set: true, grammatical, and specific to one person."""

import re
from typing import Any

import numpy as np

from datasets.synthetic.captions import WORDS, describe
from datasets.synthetic.people import COLORS, HAIR_COLORS, random_identity, random_view
from datasets.synthetic.render import plan_identity


def sightings(count: int) -> list[tuple[Any, Any, Any]]:
    result = []
    for pid in range(count):
        rng = np.random.default_rng([7, pid])
        who, view = random_identity(rng), random_view(rng)
        result.append((who, view, describe(who, view, rng)))
    return result


def test_captions_never_contradict_the_picture() -> None:
    colors = {word: name for name in {**COLORS, **HAIR_COLORS} for word in WORDS.get(name, (name,))}
    any_color = re.compile(r"\b(" + "|".join(sorted(colors, key=len, reverse=True)) + r")\b")
    for who, view, caption in sightings(400):
        assert all(getattr(who, field) == value for field, value in caption.facts.items()), (who, caption)
        assert len(caption.facts) >= 4
        said = {colors[word] for word in any_color.findall(caption.text.lower())}
        assert said <= set(caption.facts.values()), caption
        assert "none" not in caption.facts.values()
        assert not (view.back and caption.facts.get("pattern") == "logo"), caption


def test_each_stated_fact_is_in_the_text() -> None:
    marks = {"striped": "stripes", "checked": "checks", "dotted": "dots", "bald": "shaved"}
    loose = {"short": "hair", "long": "hair", "bun": "bun", "ponytail": "ponytail"}
    for _, _, caption in sightings(400):
        for value in caption.facts.values():
            words = (*WORDS.get(value, (value,)), marks.get(value, value), loose.get(value, value))
            assert any(word in caption.text for word in words), (value, caption)


def test_captions_read_as_sentences() -> None:
    for _, _, caption in sightings(400):
        text = caption.text
        assert 10 <= len(text.split()) <= 40
        assert text[0].isupper() and text.endswith(".") and "  " not in text and " ," not in text, text
        assert not re.search(r"\ban [^aeiou]|\ba [aeiou]|\b(\w+) \1\b|\{|\}|none", text), text
        his = {"man": {"he", "his"}, "woman": {"she", "her"}}[caption.facts["sex"]]
        assert set(re.findall(r"\b(?:he|she|his|her)\b", text.lower())) <= his, text


def test_most_captions_single_out_one_person_of_the_test_split() -> None:
    plans = {pid: plan_identity(0, pid, 1, 2) for pid in range(901, 1051)}
    alone = [
        sum(all(getattr(other, f) == v for f, v in caption.facts.items()) for other, _, _ in plans.values()) == 1
        for _, shots, _ in plans.values()
        for caption in shots[0].captions
    ]
    assert 0.75 < sum(alone) / len(alone) < 0.95
