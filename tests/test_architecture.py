"""Structure of the code base: import directions, file sizes, one home for devices, a test for every registered part."""

import ast
from pathlib import Path

import pytest

from datasets.annotations import ADAPTERS
from datasets.transforms import AUGMENTATIONS
from model.checkpoints.formats import FORMATS
from model.encoders import ENCODERS
from model.objectives import OBJECTIVES
from processor.trackers import TRACKERS
from solver.schedule import SCHEDULES
from tests.helpers.configs import ROOT

MAY_IMPORT = {
    "utils": set(),
    "configs": {"utils"},
    "datasets": {"configs", "utils"},
    "model": {"configs", "utils"},
    "solver": {"configs", "utils"},
    "processor": {"datasets", "model", "solver", "configs", "utils"},
    "tools": {"processor", "datasets", "model", "solver", "configs", "utils"},
    "benchmarks": {"processor", "datasets", "model", "solver", "configs", "utils"},
    ".": {"processor", "datasets", "model", "solver", "configs", "utils"},
}
UNIX_MODULES = {"curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
UNIX_NAMES = {"sched_getaffinity", "fork", "getuid", "SIGKILL", "SIGUSR1", "SIGHUP", "SIGALRM", "SIGPIPE"}
SOURCES = [
    path for folder in MAY_IMPORT for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))
]


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0] if path.parent != ROOT else "."
    ours = imported_packages(path) & (MAY_IMPORT.keys() | {"tests"})
    assert ours <= MAY_IMPORT[package] | {package}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} opens without a docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_unix_modules_are_imported_where_they_are_used(path: Path) -> None:
    """Windows can import every file."""
    tree = ast.parse(path.read_text())
    nested = {id(node) for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in nested:
            assert not {alias.name for alias in node.names} & UNIX_MODULES
        elif isinstance(node, ast.ImportFrom) and id(node) not in nested:
            assert node.module not in UNIX_MODULES
        elif isinstance(node, ast.Attribute) and id(node) not in nested:
            assert node.attr not in UNIX_NAMES


def test_only_one_file_names_a_device() -> None:
    guilty = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            literal = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda")
            call = isinstance(node, ast.Attribute) and node.attr == "cuda" and not isinstance(node.value, ast.Name)
            if (literal or call) and path != ROOT / "utils/distributed.py":
                guilty.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not guilty


def test_every_registered_name_appears_in_a_test() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for registry in (ADAPTERS, AUGMENTATIONS, ENCODERS, FORMATS, OBJECTIVES, SCHEDULES, TRACKERS):
        for name in registry:
            named = any(f"{before}{name}" in tests for before in ("'", '"', ".", "{", "name: ", "name="))
            assert named, f"{registry.kind} '{name}' has no test; add one that names it, see CONTRIBUTING.md"


def test_no_test_file_is_imported() -> None:
    """Shared functions live in tests/helpers."""
    guilty = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name.split(".") for name in names if name.startswith("tests.")]
            if any(part.startswith("test_") or part == "conftest" for module in modules for part in module):
                guilty.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not guilty
