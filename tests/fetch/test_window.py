"""The background window against simulated links: full rate, and at most one product of rate and delay in the queue."""

from __future__ import annotations

import math

import pytest

from lazymem.fetch.window import (
    BEHIND_DEMANDS,
    BESIDE_DEMANDS,
    FLOOR_PAGES,
    MAX_WINDOW_PAGES,
    MEMORY_SAMPLES,
    MEMORY_SECONDS,
    MIN_DEMANDED_PAGES,
    MIN_QUEUE_SECONDS,
    MIN_WINDOW_PAGES,
    BackgroundWindow,
)
from lazymem.pages import PAGE_SIZE


def simulate(
    rate: float, round_trip: float, seconds: float, share: float, *, demanded: bool = False
) -> tuple[BackgroundWindow, float, float]:
    """A first-in-first-out link, always kept full of guesses. Returns the window, use of the link (0 to 1), and the
    longest queue in the second half, in bytes."""
    window = BackgroundWindow()
    window.when_demanded = BEHIND_DEMANDS
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
        window.note(int(came * PAGE_SIZE * share), came, now - sent_at, round_trip, now, demanded)
    return window, late_pages * PAGE_SIZE * share / (rate * seconds / 2), queue


@pytest.mark.parametrize(
    ("rate", "round_trip"),
    [(125e6, 0.001), (12.5e6, 0.02), (125e6, 0.02), (1.25e6, 0.05)],
)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_link_is_used_and_the_queue_is_short(rate: float, round_trip: float, share: float) -> None:
    _, use, queue = simulate(rate, round_trip, 10, share)
    product = max(rate * round_trip, rate * MIN_QUEUE_SECONDS, MIN_WINDOW_PAGES * PAGE_SIZE)
    assert use > 0.85 * min(1.0, MAX_WINDOW_PAGES * PAGE_SIZE * share / (rate * round_trip))
    assert queue <= product * 1.1


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_beside_demands_the_queue_is_short_on_a_slow_link_too(share: float) -> None:
    """10 Mb/s and 20 ms: a product is six pages, and most of the link is used all the same."""
    _, use, queue = simulate(1.25e6, 0.02, 10, share, demanded=True)
    assert use > 0.5
    assert queue <= max(1.25e6 * 0.02, MIN_DEMANDED_PAGES * PAGE_SIZE)
    _, _, queue_of_all = simulate(1.25e6, 0.02, 10, share)
    assert queue < queue_of_all


def test_bounds_hold_whatever_is_measured() -> None:
    window = BackgroundWindow()
    for delivered, elapsed, best in [(1 << 40, 1e-6, 10.0), (0, 1e9, 1e-9), (5, 0.0, 1.0), (5, 1.0, math.inf)]:
        for _ in range(2000):
            window.note(delivered, 3, elapsed, best, delivered * 1.0)
            assert MIN_WINDOW_PAGES <= window.pages <= MAX_WINDOW_PAGES
            assert 1 <= window.piece_pages <= window.pages
            window.note(delivered, 3, elapsed, best, delivered * 1.0, demanded=True)
            assert MIN_DEMANDED_PAGES <= window.pages <= MAX_WINDOW_PAGES
            assert 1 <= window.piece_pages <= window.pages
            window.note(delivered, 3, elapsed, best, delivered * 1.0)


ROUND_TRIP = 0.02
RATE = 12.5e6


def settled() -> tuple[BackgroundWindow, float]:
    """A window that has found a link of 100 Mb/s, and the time."""
    window = BackgroundWindow()
    now = 0.0
    for _ in range(200):
        now += 0.01
        window.note(int(RATE * 2 * ROUND_TRIP), 122, 2 * ROUND_TRIP, ROUND_TRIP, now)
    assert window.pages == pytest.approx(122, abs=2)
    return window, now


def test_zeros_do_not_make_the_link_look_slow() -> None:
    window, now = settled()
    for _ in range(1000):
        now += 0.03
        window.note(40, 64, 0.03, ROUND_TRIP, now)
        assert window.pages >= 120
    for _ in range(20):
        now += 0.03
        window.note(int(RATE * 2 * ROUND_TRIP), 122, 2 * ROUND_TRIP, ROUND_TRIP, now)
    assert window.pages == pytest.approx(122, abs=2)


def test_answers_that_met_no_queue_do_not_make_the_link_look_slow() -> None:
    """Little was asked for: at the end of a sweep, or while the disk is behind."""
    window, now = settled()
    for _ in range(1000):
        now += 0.03
        window.note(16 * PAGE_SIZE, 16, 1.1 * ROUND_TRIP, ROUND_TRIP, now)
    assert window.pages >= 120


def test_a_slower_link_is_believed_after_a_while() -> None:
    window, now = settled()
    for _ in range(2 * MEMORY_SAMPLES + 2):
        now += MEMORY_SECONDS / MEMORY_SAMPLES * 1.5
        window.note(int(RATE / 4 * 8 * ROUND_TRIP), 122, 8 * ROUND_TRIP, ROUND_TRIP, now)
    assert window.pages == pytest.approx(31, abs=2)


def test_one_slow_answer_changes_nothing() -> None:
    window, now = settled()
    window.note(122 * PAGE_SIZE, 122, 1.0, ROUND_TRIP, now + 1.0)
    assert window.pages >= 120


def test_while_somebody_demands_there_is_less_of_a_queue() -> None:
    window, now = settled()
    before = window.pages
    window.note(int(RATE * 2 * ROUND_TRIP), 122, 2 * ROUND_TRIP, ROUND_TRIP, now + 0.01, demanded=True)
    assert window.pages == pytest.approx(before * 0.75, abs=2)


def test_behind_demands_there_is_no_queue_that_lasts() -> None:
    window, now = settled()
    before = window.pages
    window.when_demanded = BEHIND_DEMANDS
    window.note(int(RATE * 2 * ROUND_TRIP), 122, 2 * ROUND_TRIP, ROUND_TRIP, now + 0.01, demanded=True)
    assert window.pages == pytest.approx(before * 0.5, abs=2)


def test_a_link_that_becomes_faster_is_filled() -> None:
    window, now = settled()
    for _ in range(20):
        now += ROUND_TRIP
        pages = window.pages
        window.note(int(pages * PAGE_SIZE), pages, ROUND_TRIP, ROUND_TRIP, now)
    assert window.pages == MAX_WINDOW_PAGES


def test_what_others_know_of_the_link_is_not_forgotten_for_first_answers_that_did_not_fill_it() -> None:
    """A touch and ten guesses around it say a sixth of what a link of 100 Mb/s takes."""

    def touched(window: BackgroundWindow) -> int:
        for now in (0.02, 0.04, 0.06):
            window.note(10 * PAGE_SIZE, 10, ROUND_TRIP, ROUND_TRIP, now, demanded=True)
        return window.pages

    alone, told = BackgroundWindow(), BackgroundWindow()
    assert not told.knows_link
    told.suppose(RATE, ROUND_TRIP)
    assert told.knows_link
    product = RATE * ROUND_TRIP / PAGE_SIZE
    assert told.pages == pytest.approx(BESIDE_DEMANDS.gain * product, abs=1)
    assert touched(alone) < 0.3 * product
    assert touched(told) == pytest.approx(BESIDE_DEMANDS.gain * product, abs=1)


def test_a_link_that_others_knew_better_is_found_to_be_slower() -> None:
    window = BackgroundWindow()
    window.suppose(8 * RATE, ROUND_TRIP)
    for step in range(200):
        window.note(int(RATE * 2 * ROUND_TRIP), 122, 2 * ROUND_TRIP, ROUND_TRIP, step * 0.01)
    assert window.pages == pytest.approx(122, abs=2)


@pytest.mark.parametrize("rate", [1.0, 1e308])
def test_whatever_others_say_a_window_has_its_bounds(rate: float) -> None:
    window = BackgroundWindow()
    window.suppose(rate, ROUND_TRIP)
    assert MIN_DEMANDED_PAGES <= window.pages <= MAX_WINDOW_PAGES
    assert 1 <= window.piece_pages <= window.pages


def test_a_link_that_is_taken_for_fast_is_so_until_it_is_not() -> None:
    """Requests are of whole leaves at first; after as many samples as of any slower link, it is one."""
    window = BackgroundWindow(200e6)
    assert window.rate_bytes_per_second == 200e6
    assert FLOOR_PAGES <= window.pages <= 200e6 * MIN_QUEUE_SECONDS / PAGE_SIZE
    now = 0.0
    for _ in range(2 * MEMORY_SAMPLES):
        now += MEMORY_SECONDS
        window.note(256 * PAGE_SIZE, 256, 0.1, 0.001, now)
    assert window.rate_bytes_per_second == pytest.approx(256 * PAGE_SIZE / 0.1)
    assert BackgroundWindow().pages == 2 * MIN_WINDOW_PAGES
