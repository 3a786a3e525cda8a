"""Environment and fixtures of all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library import that could contact the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import numpy as np
import pytest

from datasets.synthetic.render import render_dataset
from processor import training
from tests.helpers.configs import GOLDEN, TINY, tiny_config


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect tests/gpu for `-m gpu` alone, so that other runs list no skipped tests."""
    asked = "gpu" in str(config.option.markexpr)
    return True if collection_path == Path(__file__).parent / "gpu" and not asked else None


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with rendered pedestrians: 8 + 3 + 4 identities, 2 images each, 2 captions per image."""
    folder = tmp_path_factory.mktemp("data")
    render_dataset(folder, train_ids=8, val_ids=3, test_ids=4, images_per_id=2)
    return folder


@pytest.fixture
def tiny(root: Path, tmp_path: Path) -> list[str]:
    """Overrides that make any shipped config train in seconds, with runs under tmp_path."""
    return [*TINY, f"data.root={root}", f"train.output={tmp_path / 'runs'}"]


@pytest.fixture(scope="session")
def irra_golden() -> dict[str, np.ndarray]:
    """Losses, masking, schedules and metrics of the authors' code (tests/golden/README.md)."""
    return dict(np.load(GOLDEN / "irra_fmfa_public.npz"))


@pytest.fixture(scope="session")
def model_golden() -> dict[str, np.ndarray]:
    """A small IRRA with its weights, inputs, outputs, gradients and four training steps."""
    return dict(np.load(GOLDEN / "irra_model_public.npz"))


@pytest.fixture(scope="session")
def teacher_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of a teacher trained for two epochs."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    fast = ["train.epochs=2", "solver.lr=1e-3", "solver.eps=1e-8", "solver.schedule.warmup_epochs=0"]
    return training.train(tiny_config("lcr2s_teacher", root, *fast), run)


@pytest.fixture
def small_disk():
    """Limit on the size of written files, which a program sees as a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
