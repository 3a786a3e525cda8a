"""benchmarks/ranking.py: the full argsort and the streamed ranking measure the same, on splits of the stated sizes."""

import pytest

from benchmarks import ranking
from utils.metrics import streamed_metrics


def test_the_full_argsort_agrees_with_the_streamed_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ranking.SIZES, "cuhk", ranking.Size(20, 90, 2, 0.5))
    query, gallery, *pids = ranking.split("cuhk", trained=True)
    assert (len(query), len(gallery)) == (180, 90) and len(set(pids[1].tolist())) == 20
    assert ranking.full_argsort(query, gallery, *pids) == pytest.approx(streamed_metrics(query, gallery, *pids))
