"""The final table: rows for the moving average only if there is one."""

from processor.reporting import result_table


def test_the_table_has_its_rows_only_where_it_is() -> None:
    numbers = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "mAP": 4.0, "mINP": 5.0}
    plain = {"epoch": 1, "val": numbers, "test": numbers}
    assert "averaged weights" not in result_table([plain], "val")
    both = result_table([plain | {"val_ema": numbers, "test_ema": {**numbers, "R1": 9.0}}], "test")
    assert both.count("averaged weights") == 3 and "best on test, averaged weights (best_ema.pt)" in both
    assert both.count("9.00") == 3
