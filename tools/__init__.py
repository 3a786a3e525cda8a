"""Command-line tools. A signal ends one at once while it is imported."""

import sys

from utils.signals import end_at_once

if sys.argv[0] == "-m":  # until Python has found the program of `python -m tools.NAME`
    end_at_once()
