"""Programs run in this process: `main` with arguments, and test.py's numbers."""

import pytest

import test as test_program
from processor import testing


def run_program(main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object):
    """Run `main` in this process, which saves seconds of imports; return exit status, stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
    try:
        main()
        status: object = 0
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def evaluate(*arguments: object) -> dict[str, dict[str, float]]:
    """Metrics that test.py reports for these arguments."""
    seen = {}

    def keep(*arguments: object) -> None:
        seen.update(original(*arguments))

    original = testing.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["test.py", *map(str, arguments)])
        patch.setattr(testing, "evaluate", keep)
        test_program.main()
    return seen
