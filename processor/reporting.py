"""Records of a run's epochs: the best one, and the result table."""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.logger import format_table
from utils.metrics import METRICS

EMA = "_ema"  # suffix of a split evaluated with the averaged weights
SELECTED_BY = "R1"  # metric that chooses the best epoch

Record = Mapping[str, Any]  # a line of metrics.jsonl


def best_record(history: Sequence[Record], split: str) -> Record | None:
    """The first record with the highest R1 on `split`; None if it was never evaluated."""
    evaluated = [record for record in history if split in record]
    return max(evaluated, key=lambda record: record[split][SELECTED_BY], default=None)


def result_table(history: Sequence[Record], select_on: str) -> str:
    """Test metrics of three epochs: selected on val, last, and best on test (the papers' convention).

    Averaged weights add three rows, if they were evaluated.

    Args:
        history: all records, the last of them evaluated.
        select_on: split that selects `best.pt`.
    """
    lines = []
    for suffix, name, file in (("", "", "best.pt"), (EMA, ", averaged weights", "best_ema.pt")):
        rows = {
            "selected on val": (best_record(history, "val" + suffix), "val"),
            "last epoch": (history[-1], ""),
            "best on test": (best_record(history, "test" + suffix), "test"),
        }
        for row, (record, split) in rows.items():
            if record is not None and "test" + suffix in record:
                label = row + name + (f" ({file})" if split == select_on else "")
                lines.append([label, record["epoch"], *(record["test" + suffix][key] for key in METRICS)])
    return format_table(["t2i on test", "epoch", *METRICS], lines)
