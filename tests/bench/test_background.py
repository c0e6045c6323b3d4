"""Which touches the measure `background` takes for missed."""

from __future__ import annotations

from bench.measures.background import missed_waits


def test_as_many_as_the_daemon_had_demands_and_the_longest() -> None:
    waits = [0.004, 0.00001, 0.0001, 0.00002, 0.03]
    assert missed_waits(waits, 3) == [0.0001, 0.004, 0.03]
    assert missed_waits(waits, 0) == []
    assert missed_waits(waits, 9) == sorted(waits), "one touch may be more than one demand"
