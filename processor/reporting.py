"""The records of a run's epochs: which one is the best, the table at its end, TensorBoard."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from processor.evaluator import METRICS
from utils.logger import format_table

EMA = "_ema"  # ends the name of a split that the mean of the weights was evaluated on

Record = Mapping[str, Any]  # a line of metrics.jsonl


def best_record(history: Sequence[Record], split: str) -> Record | None:
    """The first record with the highest R1 on `split`."""
    evaluated = [record for record in history if split in record]
    return max(evaluated, key=lambda record: record[split]["R1"], default=None)


def result_table(history: Sequence[Record], select_on: str) -> str:
    """Test metrics of three epochs: selected on val, last, and best on test, which is the papers' convention.

    Another three rows where the mean of the weights was evaluated, too.

    Args:
        history: all records, the last of them evaluated.
        select_on: the split that chose `best.pt`.
    """
    lines = []
    for kind, name, file in (("", "", "best.pt"), (EMA, ", mean of weights", "best_ema.pt")):
        rows = {
            "selected on val": (best_record(history, "val" + kind), "val"),
            "last epoch": (history[-1], ""),
            "best on test": (best_record(history, "test" + kind), "test"),
        }
        for row, (record, split) in rows.items():
            if record is not None and "test" + kind in record:
                label = row + name + (f" ({file})" if split == select_on else "")
                lines.append([label, record["epoch"], *(record["test" + kind][key] for key in METRICS)])
    return format_table(["t2i on test", "epoch", *METRICS], lines)


def write_board(board: SummaryWriter, record: Record) -> None:
    """Every number of the record, `val/R1` style where it is nested."""
    for name, value in record.items():
        for tag, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            board.add_scalar(f"{name}/{tag}" if tag else name, number, record["epoch"])
