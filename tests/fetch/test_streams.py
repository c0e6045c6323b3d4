"""A guest that reads page after page is told by its faults; one that does not, is not."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lazymem.fetch.streams import FIRST_AHEAD_PAGES, MAX_AHEAD_PAGES, MAX_STREAMS, STEP_PAGES, Streams
from lazymem.pages import PageRange

TOTAL = 100_000


def all_missing(pages: PageRange, limit: int) -> PageRange:
    return PageRange(pages.start, min(limit, pages.count))


def asked(streams: Streams, limit: int = 64) -> list[PageRange]:
    found = []
    while (guess := streams.next_range(limit)) is not None:
        assert 0 < guess.count <= limit
        found.append(guess)
    return found


def test_three_faults_that_go_up_make_a_stream() -> None:
    streams = Streams(all_missing, TOTAL)
    for page in (1000, 1001):
        streams.faulted(PageRange(page, 1))
        assert asked(streams) == []
    streams.faulted(PageRange(1030, 1))
    assert asked(streams) == [PageRange(1031, FIRST_AHEAD_PAGES)]


def test_it_is_asked_for_further_ahead_with_each_fault_and_no_page_twice() -> None:
    streams = Streams(all_missing, TOTAL)
    guessed: list[int] = []
    page = 1000
    for _ in range(12):
        streams.faulted(PageRange(page, 1))
        for guess in asked(streams):
            guessed += range(guess.start, guess.end)
        page = max([page, *guessed]) + 1 if guessed else page + 1  # it reads all of that, and faults behind it
    assert guessed == sorted(set(guessed))
    streams.faulted(PageRange(page, 1))
    assert sum(guess.count for guess in asked(streams)) == MAX_AHEAD_PAGES


def test_a_fault_within_what_was_guessed_goes_on() -> None:
    """Over a slow link the guest waits where the latest answer ended, far behind what was asked for."""
    streams = Streams(all_missing, TOTAL)
    for page in range(2000, 2003):
        streams.faulted(PageRange(page, 1))
    edge = asked(streams)[-1].end
    streams.faulted(PageRange(2020, 1))
    more = asked(streams)
    assert more[0].start == edge
    assert more[-1].end == 2021 + 2 * FIRST_AHEAD_PAGES


def test_the_same_fault_again_is_no_step() -> None:
    streams = Streams(all_missing, TOTAL)
    for _ in range(10):
        streams.faulted(PageRange(77, 1))
    assert asked(streams) == []


def test_what_is_here_is_passed_by_and_the_end_of_the_ram_ends_it() -> None:
    streams = Streams(lambda *_: None, TOTAL)
    for page in range(50_000, 50_010):
        streams.faulted(PageRange(page, 1))
    assert asked(streams) == []
    streams = Streams(all_missing, TOTAL)
    for page in range(TOTAL - 8, TOTAL - 4):
        streams.faulted(PageRange(page, 1))
    assert [(guess.start, guess.end) for guess in asked(streams)] == [(TOTAL - 4, TOTAL)]


def test_two_that_take_turns() -> None:
    streams = Streams(all_missing, TOTAL)
    for step in range(3):
        streams.faulted(PageRange(5000 + step, 1))
        streams.faulted(PageRange(90_000 + step, 1))
    first, second = asked(streams)
    assert (first.start, second.start) == (90_003, 5003), "the latest first"


def test_what_is_ahead_of_a_stream_is_of_one() -> None:
    streams = Streams(all_missing, TOTAL)
    for page in (5000, 5001):
        streams.faulted(PageRange(page, 1))
    assert not streams.are_of_one(PageRange(5002, 32)), "it may be an accident"
    streams.faulted(PageRange(5002, 1))
    assert streams.are_of_one(PageRange(5003, 32))
    assert streams.are_of_one(PageRange(5002 + MAX_AHEAD_PAGES, 32)), "the kernel's next 2 MiB"
    assert not streams.are_of_one(PageRange(4800, 32))
    assert not streams.are_of_one(PageRange(5000 + 2 * MAX_AHEAD_PAGES, 32))


def test_only_so_many() -> None:
    streams = Streams(all_missing, TOTAL)
    for step in range(3):
        for stream in range(MAX_STREAMS + 1):
            streams.faulted(PageRange(10_000 * stream + step, 1))
    assert asked(streams) == [], "each was forgotten before it went on"


def test_faults_at_random_are_seldom_taken_for_one() -> None:
    rng = random.Random(5)
    streams = Streams(all_missing, TOTAL)
    guessed = 0
    for _ in range(2000):
        streams.faulted(PageRange(rng.randrange(TOTAL), 1))
        guessed += sum(guess.count for guess in asked(streams))
    assert guessed < 2000


@given(st.lists(st.tuples(st.integers(0, TOTAL - 1), st.integers(1, 32)), max_size=60), st.integers(1, 100))
def test_it_ends_and_stays_within_the_ram(faults: list[tuple[int, int]], limit: int) -> None:
    streams = Streams(all_missing, TOTAL)
    for start, count in faults:
        streams.faulted(PageRange(start, min(count, TOTAL - start)))
        for guess in asked(streams, limit):
            assert 0 <= guess.start < guess.end <= TOTAL
    assert STEP_PAGES < MAX_AHEAD_PAGES
