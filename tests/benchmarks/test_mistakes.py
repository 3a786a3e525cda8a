"""Programs of benchmarks/: mistakes in their arguments and configs end in one line."""

import runpy

import pytest

from tests.helpers.programs import run_program


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        ("memory", ["--config", "nowhere.yaml"], "no such config file"),
        ("memory", ["--batch", "0"], "must be at least 1"),
        ("memory", ["--batch", "2", "--micro-batches", "4"], "--micro-batches: must be at most --batch (2), got 4"),
        ("memory", ["--set", "x=1"], "x: unknown key"),
        ("steps", ["--authors", "irra"], "--authors: must be METHOD=FOLDER, got irra"),
        ("steps", ["--configs", "nowhere.yaml"], "no such config file"),
        ("ranking", ["--rounds", "0"], "must be at least 1"),
        ("ranking", ["--size", "small"], "invalid choice"),
        ("captions", ["--rounds", "0"], "must be at least 1"),
        ("efa", ["--pairs", "0"], "must be at least 1"),
        ("distillation", ["--config", "configs/baseline.yaml"], "--config: needs distillation losses"),
        ("distillation", ["--config", "nowhere.yaml"], "no such config file"),
        ("token_selection", ["--config", "configs/ivt.yaml"], "--config: needs model.name=token_selection"),
        ("token_selection", ["--steps", "-1"], "must be at least 1"),
    ],
)
def test_a_mistake_ends_in_one_line(
    program: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def main() -> None:
        runpy.run_module(f"benchmarks.{program}", run_name="__main__")

    status, _, err = run_program(main, monkeypatch, capsys, *arguments)
    assert status in (1, 2) and message in err.strip().splitlines()[-1] and "Traceback" not in err
