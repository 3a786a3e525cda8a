"""Types of command line arguments."""

import argparse


def positive(text: str) -> int:
    """Parse an argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
