"""Run an ablation from one YAML: train its rows at several seeds, then print a table of Best and Last."""

import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from configs.arguments import Parser
from configs.schema import load_config
from processor.reporting import best_record
from processor.resolve import resolve
from processor.resume import other_settings
from processor.run_folder import finished, records, run_config
from utils.config import load_layers, typed
from utils.errors import ConfigError, DataError
from utils.exit import exit_on_user_error
from utils.metrics import METRICS
from utils.paths import expand


@dataclass(frozen=True)
class Row:
    """One line of the table: a config and its overrides."""

    config: str
    set: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ablation:
    """The file. Rows may refer to ${runs}, the parent of the run folders, and to ${seed}, the seed of the run."""

    runs: str
    rows: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])


@dataclass(frozen=True)
class Run:
    """Arguments of train.py for one row and seed, and the run folder."""

    row: str
    folder: Path
    config: str
    overrides: list[str]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("ablation", type=expand, help="YAML file, for instance configs/ablations/noise.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, help="replaces the file's seeds (default there: 1 2 3)")
    parser.add_argument("--runs", type=expand, help="parent of the run folders, replaces the file's")
    parser.add_argument("--table", action="store_true", help="print the table of finished runs without training")
    parser.add_argument("--resume", action="store_true", help="resume interrupted runs")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config of every run"
    )
    with exit_on_user_error():
        arguments = parser.parse_args()
        runs = list(planned(arguments.ablation, arguments.runs, arguments.seeds, arguments.set))
        if not runs:
            raise ConfigError(f"{arguments.ablation}: needs at least one row and one seed")
        for run in runs:
            check(run)
        if not arguments.table:
            for run in runs:
                train(run, resume=arguments.resume)
        print(table(runs))


def planned(path: Path, runs: Path | None, seeds: list[int] | None, overrides: list[str]) -> Iterator[Run]:
    """The runs of an ablation file, seed by seed.

    Args:
        path: ablation file.
        runs: parent of the run folders; None takes the file's.
        seeds: seeds; None takes the file's.
        overrides: overrides for every run.

    Raises:
        ConfigError: the file or a row is malformed.
    """
    ablation = typed(Ablation, load_layers(path))
    runs = expand(runs or ablation.runs)
    for seed in seeds or ablation.seeds:
        for name, content in ablation.rows.items():
            row = typed(Row, content, f"rows.{name}") if isinstance(content, Mapping) else Row(str(content))
            overrides_of_row = [Template(text).safe_substitute(runs=runs, seed=seed) for text in row.set]
            own = [f"name={name}", f"train.seed={seed}"]
            yield Run(name, runs / f"{name}_{seed}", row.config, [*overrides, *overrides_of_row, *own])


def check(run: Run) -> None:
    """Raise `ConfigError` for a mistake in the run's config, or if its folder holds a run of another config."""
    config = resolve(load_config(run.config, run.overrides))
    if not run.folder.exists():
        return
    if other := other_settings(run_config(run.folder, []), config):
        listed = "\n".join(f"  {line}" for line in other)
        raise ConfigError(f"{run.folder}: holds a run of another config; remove it, or choose other --runs:\n{listed}")


def train(run: Run, *, resume: bool) -> None:
    """Train one run, unless it has finished already.

    Args:
        run: row and seed.
        resume: resume it if it was interrupted.

    Raises:
        ConfigError: the run is unfinished and may not be resumed, or training fails.
    """
    if finished(run.folder):
        return
    command = ["train.py", "--config", run.config, "--run", str(run.folder), "--set", *run.overrides]
    if run.folder.exists():
        command = ["train.py", "--resume", str(run.folder)]
        if not resume:
            raise ConfigError(f"{run.folder}: unfinished run; wait for it if it is still running, or add --resume")
    if subprocess.run([sys.executable, *command]).returncode != 0:
        raise ConfigError(f"training failed, see above: python {' '.join(command)}")


def table(runs: list[Run]) -> str:
    """Markdown table of test metrics: means over the seeds of finished runs, and the R@1 of each seed.

    Best is the epoch with the highest R@1 on `eval.select_on`, Last the last one.

    Raises:
        DataError: no run has finished.
    """
    lines = [
        f"| run | checkpoint | {' | '.join(METRICS)} | R1 of each seed |",
        "|---|---|" + "---:|" * len(METRICS) + "---|",
    ]
    for row in dict.fromkeys(run.row for run in runs):
        folders = [run.folder for run in runs if run.row == row and finished(run.folder)]
        histories = [(records(folder), run_config(folder, []).eval.select_on) for folder in folders]
        best = [best_record(history, split) for history, split in histories]
        last = [history[-1] for history, _ in histories]
        for checkpoint, records_of in (("Best", best), ("Last", last)):
            if measured := [record["test"] for record in records_of if record and "test" in record]:
                lines.append(_line(f"| {row} | {checkpoint}", measured))
    if len(lines) == 2:
        raise DataError(f"{runs[0].folder.parent}: has no finished run of this ablation")
    return "\n".join(lines)


def _line(start: str, measured: list[Mapping[str, float]]) -> str:
    means = " | ".join(f"{statistics.fmean(one[name] for one in measured):.2f}" for name in METRICS)
    return f"{start} | {means} | {', '.join(format(one['R1'], '.2f') for one in measured)} |"


if __name__ == "__main__":
    main()
