"""Shared by all tests: no network, one thread per process is enough, golden files, tiny configs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of a library that might ask the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def irra_golden() -> dict[str, np.ndarray]:
    """Losses, masking, schedules and metrics of the authors' code (tests/golden/README.md)."""
    return dict(np.load(GOLDEN / "irra_fmfa_public.npz"))


@pytest.fixture(scope="session")
def model_golden() -> dict[str, np.ndarray]:
    """A small IRRA with its weights, inputs, outputs, gradients and four training steps."""
    return dict(np.load(GOLDEN / "irra_model_public.npz"))
