"""Free disk space of finished runs: `python -m tools.trim_runs runs` lists it, and `--apply` frees it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.arguments import Parser
from processor.run_folder import finished
from processor.saving import DTYPES, floating, in_precision
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError, DataError, UserError
from utils.exit import exit_on_user_error
from utils.files import locked
from utils.logger import LOGGER, format_table, start_logging
from utils.paths import expand


def main() -> None:
    parser = Parser(description="Drop the training state from last.pt of finished runs.")
    parser.add_argument("folder", type=expand, nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--apply", action="store_true", help="write the smaller files; default: list them only")
    parser.add_argument("--precision", choices=DTYPES, help="also store all weights in this precision")
    with exit_on_user_error():
        arguments = parser.parse_args()
        start_logging()
        rows, freed = [], 0
        for run in run_folders(arguments.folder):
            outcome, size = trim(run, precision=arguments.precision, apply=arguments.apply)
            rows.append([str(run), outcome, f"{size / 1e6:.1f}"])
            freed += size
        LOGGER.info("\n%s", format_table(["run", "last.pt and other weights", "MB"], rows))
        hint = "" if arguments.apply else "; nothing is changed yet, add --apply (trimmed runs cannot be resumed)"
        LOGGER.info("%s %.1f MB%s", "freed" if arguments.apply else "would free", freed / 1e6, hint)


def run_folders(folders: list[Path]) -> Iterator[Path]:
    """Folders with a config.yaml and checkpoints, in and below the given ones; raises `DataError` if there are none."""
    found = sorted({path.parent for folder in folders for path in folder.rglob("config.yaml")})
    runs = [run for run in found if any(run.glob("*.pt"))]
    if not runs:
        raise DataError(f"{', '.join(map(str, folders))}: no run folders with checkpoints there")
    yield from runs


def trim(run: Path, *, precision: str | None, apply: bool) -> tuple[str, int]:
    """Drop what a finished run does not need any more.

    Args:
        run: run folder.
        precision: precision to store the weights in; None leaves it.
        apply: write the files.

    Returns:
        What is done, and the bytes that it frees.
    """
    try:
        if not finished(run):
            return "unfinished: left alone", 0
        freed = 0
        with locked(run) if apply else contextlib.nullcontext():
            for path in sorted(run.glob("*.pt")):
                before = path.stat().st_size
                content, expected = _smaller(path, precision)
                if expected and apply:
                    save_checkpoint(path, content)
                    expected = before - path.stat().st_size
                freed += expected
        return ("trimmed" if apply else "would be trimmed") if freed else "nothing to trim", freed
    except UserError as error:  # the other runs may be fine
        return f"left alone ({error})", 0


def _smaller(path: Path, precision: str | None) -> tuple[dict[str, Any], int]:
    """The content of a checkpoint without its training state, and about how many bytes are saved."""
    content = load_checkpoint(path)
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path}: no checkpoint of train.py")
    before = sum(tensor.nbytes for _, tensor in floating(content))
    content.pop("training", None)
    if precision is not None:
        content["model"] = in_precision(content["model"], precision)
    return content, before - sum(tensor.nbytes for _, tensor in floating(content))


if __name__ == "__main__":
    main()
