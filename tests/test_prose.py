"""Prose of the code and the docs, as far as a program can check it (CONTRIBUTING.md, rules of prose)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "datasets", "model", "solver", "processor", "utils", "tools", "benchmarks", "tests")
SOURCES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")]

CLAUSES = re.compile(r"(What|Whether|Which|Of|Those|How|Who|Where|Without|As|It)\b")
CLAUSE_ENTRIES = re.compile(r"(of|from|those|what|whose)\b")
# Words that the field has better ones for, and citations that no reader can resolve.
BANNED = re.compile(
    r"all the same|could not be had|\bso many\b|\banew\b|\bstand-ins?\b|goes on with|go on with|going on with"
    r"|starts? fresh|\bspec \d|\bquirk Q\d|(?<!here )\bis no (?!longer\b)[a-z]+|, too[,.:;]"
)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(place, docstring) of every module, class and function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


def entries(docstring: str) -> Iterator[str]:
    """Descriptions of the entries in the Args section of a docstring."""
    _, _, section = docstring.partition("Args:\n")
    for line in section.split("\n\n")[0].splitlines():
        if match := re.match(r"    \*{0,2}[\w, ]+(?: \([^)]*\))?: *(\S.*)", line):
            yield match[1]


def test_docstrings_open_with_a_noun_or_an_imperative() -> None:
    assert not [place for path in SOURCES for place, text in docstrings(path) if CLAUSES.match(text)]


def test_arguments_are_noun_phrases() -> None:
    assert not [
        f"{place}: {entry}"
        for path in SOURCES
        for place, text in docstrings(path)
        for entry in entries(text)
        if CLAUSE_ENTRIES.match(entry)
    ]


def test_the_checks_find_what_they_look_for() -> None:
    text = "Whether it is.\n\nArgs:\n    seed: of the order.\n    size (int): number of pairs.\n\nReturns:\n    x: of."
    assert CLAUSES.match(text) and list(entries(text)) == ["of the order.", "number of pairs."]
    assert CLAUSE_ENTRIES.match("of the order.") and not CLAUSE_ENTRIES.match("offset of the order.")
    for wrong in ("spec 1.5", "quirk Q17", "this is no result", "a mask, too.", "heads start fresh"):
        assert BANNED.search(wrong)
    assert not BANNED.search("the loss is no longer finite")


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_field(path: Path) -> None:
    if path != Path(__file__):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if BANNED.search(line)]
