"""The device of the GPU tests, and the table that they end with."""

from collections.abc import Callable

import pytest
import torch

from utils.distributed import describe_device

ROWS = pytest.StashKey[list[tuple[str, str]]]()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch.cuda.is_available() is False")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Add a row (check, result) to the table."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda check, result: rows.append((check, result))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if rows:
        gpu = describe_device(torch.device("cuda"))
        terminalreporter.section("table to paste into an issue")
        terminalreporter.line(f"| {gpu}, torch {torch.__version__}, CUDA {torch.version.cuda} | |\n|---|---|")
        for check, result in rows:
            terminalreporter.line(f"| {check} | {result} |")
