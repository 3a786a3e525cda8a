"""The noisy-correspondence benchmark: train configs at several noise rates and seeds, and table Best and Last."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.schema import load_config
from processor.evaluator import METRICS
from processor.results import best_record
from utils.errors import ConfigError, DataError
from utils.faults import exit_on_user_error

ROWS = ("Best", "Last")
Results = dict[str, dict[str, float]]  # Best, Last -> test metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", required=True, metavar="YAML", help="for instance configs/irra.yaml")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.2, 0.5, 0.8], help="default: 0 0.2 0.5 0.8")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of train.seed; default: 1 2 3")
    parser.add_argument("--runs", type=Path, default=Path("runs/noise"), help="folder of the run folders")
    parser.add_argument("--table", action="store_true", help="table the runs that are there, train none")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every run")
    arguments = parser.parse_args()
    with exit_on_user_error():
        names = {load_config(path, arguments.set).name: path for path in arguments.configs}
        if not arguments.table:
            for rate in arguments.rates:
                for seed in arguments.seeds:
                    for name, path in names.items():
                        train(path, run_folder(arguments.runs, name, rate, seed), rate, seed, arguments.set)
        print(table(arguments.runs, names, arguments.rates, arguments.seeds))


def run_folder(runs: Path, name: str, rate: float, seed: int) -> Path:
    return runs / f"{name}_{rate:g}_{seed}"


def train(config: str, run: Path, rate: float, seed: int, overrides: Iterable[str]) -> None:
    """One run of train.py, unless it is there already.

    Raises:
        ConfigError: its folder holds a run that did not end, or training fails.
    """
    if finished(run):
        return
    if run.exists():
        raise ConfigError(f"{run}: a run that is still going on, or did not end: python train.py --resume {run}")
    own = [f"data.noise_rate={rate:g}", f"train.seed={seed}"]
    command = [sys.executable, "train.py", "--config", config, "--run", str(run), "--set", *overrides, *own]
    if subprocess.run(command, env={**os.environ}).returncode != 0:
        raise ConfigError(f"training failed: {' '.join(command[1:])}")


def finished(run: Path) -> bool:
    """Whether the run folder holds all its epochs."""
    if not (run / "metrics.jsonl").is_file():
        return False
    return len(records(run)) == load_config(run / "config.yaml").train.epochs


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def results(run: Path) -> Results:
    """Test metrics of the epoch with the best R@1 on `eval.select_on`, and of the last one."""
    split = load_config(run / "config.yaml").eval.select_on
    history = records(run)
    best = best_record(history, split)
    assert best is not None  # the last epoch is always evaluated
    return {"Best": best["test"], "Last": history[-1]["test"]}


def table(runs: Path, names: Iterable[str], rates: Iterable[float], seeds: Iterable[int]) -> str:
    """Markdown: means over the finished runs' seeds, and the R@1 of each.

    Raises:
        DataError: not one of the runs is there.
    """
    lines = [
        f"| noise | config | checkpoint | {' | '.join(METRICS)} | R1 of each seed |",
        "|---:|---|---|" + "---:|" * len(METRICS) + "---|",
    ]
    for rate in rates:
        for name in names:
            folders = [run_folder(runs, name, rate, seed) for seed in seeds]
            found = [results(run) for run in folders if finished(run)]
            lines += [_line(f"| {rate:.0%} | {name} | {row}", [one[row] for one in found]) for row in ROWS if found]
    if len(lines) == 2:
        raise DataError(f"{runs}: holds no run that ended of these configs, rates and seeds")
    return "\n".join(lines)


def _line(start: str, measured: list[Mapping[str, float]]) -> str:
    means = " | ".join(f"{statistics.fmean(one[name] for one in measured):.2f}" for name in METRICS)
    return f"{start} | {means} | {', '.join(format(one['R1'], '.2f') for one in measured)} |"


if __name__ == "__main__":
    main()
