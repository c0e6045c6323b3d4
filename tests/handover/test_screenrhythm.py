"""When a screen rests, and for how long, by looks that take time themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers

from lazymem.handover.screenrhythm import Drawing, areas, changed_pages
from lazymem.pages import PAGE_SIZE
from tests.support.drawnscreen import LOOK_SECONDS, DrawnScreen

PAGES = 20


def drawing(screen: DrawnScreen, *, first: int = 0, seconds: float = 0.3) -> Drawing:
    last = (PAGES - 1) * PAGE_SIZE
    return Drawing(screen.read, first * PAGE_SIZE, last, screen.now + seconds, clock=screen.clock)


@given(floats(0, 0.02), floats(0.004, 0.045), floats(0, 0.1))
def test_a_rest_is_found_and_ends_when_it_is_said_to_end(draws: float, rests: float, later: float) -> None:
    """To the length of the looks, wherever in its drawing it was when it was looked at first."""
    screen = DrawnScreen(PAGES, draws=draws, rests=rests)
    screen.now += later
    rest = drawing(screen).maybe_rest()
    assert rest is not None
    assert rest.began == screen.now
    assert rest.seconds == pytest.approx(rests + draws / PAGES, abs=4 * LOOK_SECONDS)
    assert rest.cycle_seconds == pytest.approx(draws + rests, abs=4 * LOOK_SECONDS)
    assert rest.seconds == pytest.approx(screen.seconds_to_next(), abs=4 * LOOK_SECONDS)


def test_a_screen_that_is_drawn_seldom_has_none() -> None:
    screen = DrawnScreen(PAGES, draws=0.01, rests=1.0)
    begun = screen.now
    assert drawing(screen).maybe_rest() is None
    assert screen.now - begun < 0.1


def test_a_place_that_is_drawn_once_has_none() -> None:
    screen = DrawnScreen(PAGES, draws=0.01, rests=0.01, still=10)
    assert drawing(screen, first=3).maybe_rest() is None


def test_nothing_is_waited_for_when_there_is_no_time() -> None:
    screen = DrawnScreen(PAGES, draws=0.01, rests=0.03)
    begun = screen.now
    assert drawing(screen, seconds=0.03).maybe_rest() is None
    assert screen.now - begun < 0.03 + 4 * LOOK_SECONDS


@given(floats(0, 0.02), floats(0.004, 0.045), floats(0.02, 0.3))
def test_a_rest_is_over_when_there_is_no_more_time(draws: float, rests: float, seconds: float) -> None:
    screen = DrawnScreen(PAGES, draws=draws, rests=rests)
    end = screen.now + seconds
    rest = drawing(screen, seconds=seconds).maybe_rest()
    assert rest is None or rest.began + rest.seconds <= end + LOOK_SECONDS / 100


def test_pages_that_changed() -> None:
    screen = DrawnScreen(300, draws=0.001, rests=0.01, still=260)
    sent = screen.sent()
    screen.now += 0.02
    screen.readings = 0
    assert changed_pages(screen.read, sent) == [number * PAGE_SIZE for number in range(260, 300)]
    assert screen.readings == 2
    del sent[299 * PAGE_SIZE], sent[0]
    assert changed_pages(screen.read, sent) == [number * PAGE_SIZE for number in range(260, 299)]
    assert changed_pages(screen.read, {}) == []


@given(integers(0, 5), integers(1, 60), integers(1, 20))
def test_areas_are_apart_by_gaps(begin: int, gap: int, least: int) -> None:
    pages = [begin * PAGE_SIZE, (begin + gap) * PAGE_SIZE]
    one = [(pages[0], pages[1] + PAGE_SIZE)]
    two = [(page, page + PAGE_SIZE) for page in pages]
    assert areas(pages, least) == (one if gap - 1 < least else two)
    assert areas([], least) == []
