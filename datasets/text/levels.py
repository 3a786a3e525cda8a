"""Texts of three levels for one caption: the whole sentence, a phrase, a word (IVT spec 3.2)."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from utils.errors import ConfigError
from utils.registry import did_you_mean

SHORTEST = 5  # characters, spaces included: a piece must have more


def phrase_candidates(caption: str, *, strip_brackets: bool = True) -> list[str]:
    """Of each sentence, its longest clause, and the others together (IVT processor.py:get_phrase_level_txt).

    Without `strip_brackets`, what the code falls back on where an annotation has no attributes
    (datasets/bases.py:ImageDatasetLevelData).
    """
    kept = []
    for clauses in _clauses(_bare(caption, strip_brackets)):
        longest = max(range(len(clauses)), key=lambda number: len(clauses[number]))
        others = ",".join(clause for number, clause in enumerate(clauses) if number != longest)
        kept += [clauses[longest], others.strip(",")]
    return _long_enough(kept)


def clause_candidates(caption: str) -> list[str]:
    """What stands between commas (IVT datasets/bases.py:ImageDatasetLevelICFG, its "word" level)."""
    return _long_enough(clause for clauses in _clauses(_bare(caption, True)) for clause in clauses)


def attribute_words(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    """A random number, at least one, of an annotation's attribute phrases in random order, joined by commas."""
    names = list(attributes)
    chosen = rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]
    return ",".join(attributes[names[place]] for place in chosen.tolist())


def text_of_level(
    caption: str, level: str, rng: np.random.Generator, attributes: Mapping[str, str] | None = None
) -> str:
    """One text of `level` for a caption, drawn uniformly from its candidates; the caption where there are none.

    Args:
        level: of LEVELS.
        attributes: where given, words are drawn from them and not from the clauses; from the phrases if it is empty.

    Returns:
        Lower case, as the reference's texts are.
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
    """Raise `ConfigError` for a level that does not exist, or none at all."""
    for level in levels:
        if level not in LEVELS:
            raise ConfigError(f"data.text_levels: unknown '{level}'; {did_you_mean(level, LEVELS)}")
    if not levels:
        raise ConfigError(f"data.text_levels: name at least one of {', '.join(LEVELS)}")


def _bare(caption: str, strip_brackets: bool) -> str:
    text = caption.strip(".")
    return text.strip("[").strip("]") if strip_brackets else text


def _clauses(text: str) -> list[list[str]]:
    return [sentence.split(",") for sentence in text.split(".")]


def _long_enough(pieces: Iterable[str]) -> list[str]:
    return [piece.strip(" ") for piece in pieces if len(piece) > SHORTEST]


LEVELS: dict[str, Callable[[str], list[str]]] = {
    "word": clause_candidates,
    "phrase": phrase_candidates,
    "sentence": lambda caption: [caption],
}
