"""Texts of three levels for one caption: sentence, phrase, word (docs/methods/ivt.md#text-levels)."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from utils.errors import ConfigError
from utils.registry import did_you_mean

MIN_LENGTH = 6  # characters of a piece, spaces included


def phrase_candidates(caption: str, *, strip_brackets: bool = True) -> list[str]:
    """Phrases of a caption: the longest clause of each sentence, and its other clauses together.

    See TencentYoutuResearch/PersonRetrieval-IVT@f205788:processor.py:get_phrase_level_txt.

    Args:
        caption: caption in lower case.
        strip_brackets: strip brackets at both ends; the reference keeps them for annotations without attributes.
    """
    kept = []
    for clauses in _clauses(_bare(caption, strip_brackets)):
        longest = max(range(len(clauses)), key=lambda number: len(clauses[number]))
        others = ",".join(clause for number, clause in enumerate(clauses) if number != longest)
        kept += [clauses[longest], others.strip(",")]
    return _long_enough(kept)


def clause_candidates(caption: str) -> list[str]:
    """Clauses between commas, which the reference calls words (its datasets/bases.py:ImageDatasetLevelICFG)."""
    return _long_enough(clause for clauses in _clauses(_bare(caption, True)) for clause in clauses)


def attribute_words(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    """At least one of an annotation's attribute phrases, in random number and order, joined by commas."""
    names = list(attributes)
    chosen = rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]
    return ",".join(attributes[names[place]] for place in chosen.tolist())


def text_of_level(
    caption: str, level: str, rng: np.random.Generator, attributes: Mapping[str, str] | None = None
) -> str:
    """Draw a text of a level for a caption, uniformly from its candidates; the caption itself if there are none.

    Args:
        caption: caption of the pair.
        level: one of LEVELS.
        rng: generator of the draw.
        attributes: phrases of the caption, which the word level draws from in place of clauses; if empty, it draws from
            the phrase level.

    Returns:
        The text in lower case, as in the reference.
    """
    caption = caption.lower()
    if level == "word" and attributes:
        return attribute_words(attributes, rng).lower() or caption
    if level == "word" and attributes is not None:
        candidates = phrase_candidates(caption, strip_brackets=False)
    else:
        candidates = LEVELS[level](caption)
    return candidates[rng.integers(len(candidates))] if candidates else caption


def check_levels(levels: list[str]) -> None:
    """Raise `ConfigError` for an unknown level or an empty list."""
    for level in levels:
        if level not in LEVELS:
            raise ConfigError(f"data.text_levels: unknown '{level}'; {did_you_mean(level, LEVELS)}")
    if not levels:
        raise ConfigError(f"data.text_levels: needs at least one of {', '.join(LEVELS)}, got none")


def _bare(caption: str, strip_brackets: bool) -> str:
    text = caption.strip(".")
    return text.strip("[").strip("]") if strip_brackets else text


def _clauses(text: str) -> list[list[str]]:
    return [sentence.split(",") for sentence in text.split(".")]


def _long_enough(pieces: Iterable[str]) -> list[str]:
    return [piece.strip(" ") for piece in pieces if len(piece) >= MIN_LENGTH]


LEVELS: dict[str, Callable[[str], list[str]]] = {
    "word": clause_candidates,
    "phrase": phrase_candidates,
    "sentence": lambda caption: [caption],
}
