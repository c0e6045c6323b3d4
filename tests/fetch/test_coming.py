"""What two processes see of each other's pages, and when it pays to wait for one: pure but for the memory."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import random

import pytest

from lazymem.fetch.coming import _SENT, REQUESTS, UNNUMBERED, VARIATIONS, Coming, shared_memory
from lazymem.pages import PageRange

PAGES = 300
NOW = 1000.0
ANSWER = 0.02
PAGE = PageRange(7, 1)


def with_usual(takes: float, count: int = 50) -> Coming:
    """Whose requests took so long, again and again."""
    coming = Coming(PAGES)
    for _ in range(count):
        coming.end(coming.begin(NOW), [], NOW + takes)
    return coming


def numbers(ranges: list[PageRange]) -> set[int]:
    return {page for pages in ranges for page in range(pages.start, pages.end)}


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_those_that_nobody_has(seed: int) -> None:
    choose = random.Random(seed)
    coming, guessed, demanded = Coming(PAGES), set(range(0)), set(range(0))
    for _ in range(12):
        pages = PageRange(choose.randrange(PAGES - 40), choose.randrange(1, 40))
        if choose.random() < 0.5:
            coming.guess(choose.randrange(1, UNNUMBERED + 1), pages)
            guessed |= numbers([pages])
        else:
            coming.demand(pages)
            demanded |= numbers([pages])
    for _ in range(40):
        pages = PageRange(choose.randrange(PAGES - 60), choose.randrange(1, 60))
        of = numbers([pages])
        free, not_guessed = coming.free(pages), coming.not_guessed(pages)
        assert numbers(free) == of - guessed - demanded
        assert numbers(not_guessed) == of - guessed
        assert all(before.end < after.start for before, after in itertools.pairwise(free))
        assert coming.is_demanded(pages) == bool(of & demanded)
    for page in range(PAGES):
        assert coming.is_guessed(page) == (page in guessed)


def test_what_ended_is_free_again() -> None:
    coming = Coming(PAGES)
    number = coming.begin(NOW)
    coming.guess(number, PAGE)
    coming.demand(PageRange(8, 2))
    coming.end(number, [PAGE])
    coming.forget(PageRange(8, 2))
    assert coming.free(PageRange(0, PAGES)) == [PageRange(0, PAGES)]


@pytest.mark.parametrize(
    ("sent_before", "waits"),
    [(0.0, False), (0.005, False), (0.011, True), (0.025, True), (0.0301, False), (1.0, False)],
)
def test_a_page_is_waited_for_when_it_is_here_before_an_answer(sent_before: float, waits: bool) -> None:
    """A request usually takes 30 ms, a demand's answer 20: one that was sent 10 ms ago is as good."""
    coming = with_usual(0.03)
    coming.guess(number := coming.begin(NOW - sent_before), PAGE)
    maybe_until = coming.maybe_wait(PAGE, NOW, ANSWER)
    assert (maybe_until is not None) == waits
    if maybe_until is not None:
        assert NOW < maybe_until <= NOW + ANSWER
    coming.end(number, [PAGE])
    assert coming.maybe_wait(PAGE, NOW, ANSWER) is None, "it does not come any more"


def test_a_late_one_is_waited_for_as_long_as_times_vary_and_never_longer_than_an_answer_takes() -> None:
    coming = Coming(PAGES)
    for turn in range(200):
        coming.end(coming.begin(NOW), [], NOW + (0.02 if turn % 2 else 0.04))
    coming.guess(coming.begin(NOW - 0.035), PAGE)
    until = coming.maybe_wait(PAGE, NOW, ANSWER)
    assert until == pytest.approx(NOW - 0.035 + 0.03 + VARIATIONS * 0.01, abs=0.003)
    assert coming.maybe_wait(PAGE, NOW, 0.001) == pytest.approx(NOW + 0.001)


def test_all_pages_must_be_on_their_way_and_the_latest_counts() -> None:
    coming = with_usual(0.03)
    coming.guess(coming.begin(NOW - 0.029), PageRange(10, 4))
    pages = PageRange(10, 8)
    assert coming.maybe_wait(pages, NOW, ANSWER) is None, "half of them is not"
    coming.guess(coming.begin(NOW - 0.001), PageRange(14, 4))
    assert coming.maybe_wait(pages, NOW, ANSWER) is None, "half of them comes too late"
    coming.guess(UNNUMBERED, PageRange(14, 4))
    assert coming.maybe_wait(pages, NOW, ANSWER) is None, "nobody knows when half of them comes"
    coming.guess(coming.begin(NOW - 0.02), PageRange(14, 4))
    assert coming.maybe_wait(pages, NOW, ANSWER) is not None


def test_nothing_is_waited_for_before_anything_is_known() -> None:
    coming = Coming(PAGES)
    coming.guess(coming.begin(NOW - 0.01), PAGE)
    assert coming.maybe_wait(PAGE, NOW, ANSWER) is None
    coming = with_usual(0.03)
    coming.guess(coming.begin(NOW - 0.02), PAGE)
    assert coming.maybe_wait(PAGE, NOW, math.inf) is None, "no answer was measured"


@pytest.mark.parametrize("word", [math.nan, math.inf, -math.inf, -1e308, 1e308, 0.0])
@pytest.mark.parametrize("at", range(_SENT + 1))
def test_whatever_the_other_process_writes_no_wait_is_longer_than_an_answer(word: float, at: int) -> None:
    coming = with_usual(0.03)
    coming.guess(coming.begin(NOW - 0.02), PAGE)
    number = coming._map[4096 + PAGE.start]
    coming._words[at if at < _SENT else _SENT + number] = word
    maybe_until = coming.maybe_wait(PAGE, NOW, ANSWER)
    assert maybe_until is None or NOW < maybe_until <= NOW + ANSWER


def test_more_requests_than_numbers() -> None:
    coming = Coming(PAGES)
    found = [coming.begin(NOW) for _ in range(REQUESTS + 3)]
    assert sorted(found)[:REQUESTS] == list(range(1, REQUESTS + 1))
    assert found[REQUESTS:] == [UNNUMBERED] * 3
    coming.end(UNNUMBERED, [PAGE])
    coming.end(found[5], [PAGE])
    assert coming.begin(NOW) == found[5]


def test_the_other_process_sees_it_and_cannot_shorten_it() -> None:
    fd = shared_memory(PAGES)
    try:
        ours, theirs = Coming(PAGES, fd), Coming(PAGES, fd)
        theirs.guess(theirs.begin(NOW), PAGE)
        ours.demand(PageRange(20, 2))
        ours.note_waiting(1)
        assert ours.bytes_per_second == 0
        theirs.tell_rate(12.5e6)
        assert ours.bytes_per_second == 12.5e6
        assert ours.is_guessed(PAGE.start)
        assert theirs.is_demanded(PageRange(0, 21))
        assert theirs.is_waited_for
        with pytest.raises(PermissionError):
            os.ftruncate(fd, mmap.PAGESIZE)
    finally:
        os.close(fd)
