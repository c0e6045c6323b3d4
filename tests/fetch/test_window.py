"""The background window against simulated links: full rate, and at most one product of rate and delay in the queue."""

from __future__ import annotations

import math

import pytest

from lazymem.fetch.window import MAX_WINDOW_PAGES, MIN_WINDOW_PAGES, BackgroundWindow
from lazymem.pages import PAGE_SIZE


def simulate(rate: float, round_trip: float, seconds: float, share: float) -> tuple[BackgroundWindow, float, float]:
    """A first-in-first-out link, always kept full of guesses. Returns the window, use of the link (0 to 1), and the
    longest queue in the second half, in bytes."""
    window = BackgroundWindow()
    now = free_at = 0.0
    out: list[tuple[float, int, float, int]] = []  # arrival, pages, sent at, delivered before
    delivered = late_pages = 0
    queue = 0.0
    while now < seconds:
        while sum(flight[1] for flight in out) + window.piece_pages <= window.pages:
            pages = window.piece_pages
            starts = max(now + round_trip / 2, free_at)
            if now > seconds / 2:
                queue = max(queue, (starts - now - round_trip / 2) * rate)
            free_at = starts + pages * PAGE_SIZE * share / rate
            out.append((free_at + round_trip / 2, pages, now, delivered))
        now, pages, sent_at, before = out.pop(0)
        delivered += pages
        late_pages += pages if now > seconds / 2 else 0
        came = delivered - before
        window.note(int(came * PAGE_SIZE * share), came, now - sent_at, round_trip)
    return window, late_pages * PAGE_SIZE * share / (rate * seconds / 2), queue


@pytest.mark.parametrize(
    ("rate", "round_trip"),
    [(125e6, 0.001), (12.5e6, 0.02), (125e6, 0.02), (1.25e6, 0.05)],
)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_link_is_used_and_the_queue_is_short(rate: float, round_trip: float, share: float) -> None:
    _, use, queue = simulate(rate, round_trip, 10, share)
    product = max(rate * round_trip, rate * 0.002, MIN_WINDOW_PAGES * PAGE_SIZE)
    assert use > 0.85 * min(1.0, MAX_WINDOW_PAGES * PAGE_SIZE * share / (rate * round_trip))
    assert queue <= product * 1.1


def test_bounds_hold_whatever_is_measured() -> None:
    window = BackgroundWindow()
    for delivered, elapsed, best in [(1 << 40, 1e-6, 10.0), (0, 1e9, 1e-9), (5, 0.0, 1.0), (5, 1.0, math.inf)]:
        for _ in range(2000):
            window.note(delivered, 3, elapsed, best)
            assert MIN_WINDOW_PAGES <= window.pages <= MAX_WINDOW_PAGES
            assert 1 <= window.piece_pages <= window.pages
