"""Types of command line arguments: what they take and what they refuse."""

import argparse

import pytest

from utils.arguments import positive


def test_counts_begin_at_one() -> None:
    assert positive("3") == 3
    for text in ("0", "-2"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be at least 1, got"):
            positive(text)
    for text in ("1.5", "many", "9" * 5000):
        with pytest.raises(ValueError, match=r"int|integer"):  # argparse names the argument
            positive(text)
