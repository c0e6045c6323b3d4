"""Back-off: full jitter, growth to the cap, and a fresh start after a success."""

from __future__ import annotations

import random

from lazymem.fetch.backoff import Backoff


class Highest(random.Random):
    """Draws the upper end every time."""

    def uniform(self, a: float, b: float) -> float:
        assert a == 0
        return b


def test_ceiling_doubles_up_to_the_cap_and_stays_there() -> None:
    backoff = Backoff(0.05, 5.0, Highest())
    assert [backoff.next_delay() for _ in range(9)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_a_success_starts_over() -> None:
    backoff = Backoff(0.05, 5.0, Highest())
    for _ in range(5):
        backoff.next_delay()
    backoff.reset()
    assert backoff.next_delay() == 0.05


def test_delays_are_spread_over_the_whole_interval() -> None:
    backoff = Backoff(8.0, 8.0, random.Random(1))
    delays = [backoff.next_delay() for _ in range(1000)]
    assert all(0 <= delay <= 8 for delay in delays)
    assert all(any(low <= delay < low + 1 for delay in delays) for low in range(8))


def test_years_of_failures_are_no_overflow() -> None:
    backoff = Backoff(0.05, 5.0, Highest())
    assert {backoff.next_delay() for _ in range(5000)} >= {5.0}
