"""benchmarks/common/rounds.py: ways take turns, ratios are by round, a disturbed machine is said."""

import pytest

from benchmarks.common import rounds


def test_ways_take_turns_after_a_round_of_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "probe", lambda: 1.0)
    calls: list[str] = []
    timed = rounds.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == list("ababab") and [len(timed.seconds[name]) for name in "ab"] == [2, 2]
    assert len(timed.probe) == 3 and "undisturbed" in timed.note


def test_ratios_are_by_round_and_a_disturbed_machine_is_said() -> None:
    timed = rounds.Rounds({"floor": [1.0, 10.0, 1.0], "way": [2.0, 20.0, 3.0]}, [1.0, 1.2])
    assert timed.ratio("way", "floor") == 2 and timed.cells("way") == "3.000 | 2.000 to 20.000"
    assert "20 % (DISTURBED" in timed.note
