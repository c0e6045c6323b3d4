"""Guesses: near the guest's own faults first, then everything that is missing, and then an end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazymem.digests import LEAF_PAGES
from lazymem.fetch.prefetch import (
    MAX_LEAD_LEAVES,
    MAX_RECENT_FAULTS,
    NEIGHBOURHOOD_PAGES,
    SCOUT_LEAVES,
    SweepPrefetcher,
)
from lazymem.pages import PageRange

TOTAL = 1000


class Pages:
    """What is missing, as the sink would tell it."""

    def __init__(self, missing: set[int]) -> None:
        self.missing = missing

    def next_missing(self, start: int, limit: int) -> PageRange | None:
        first = min((page for page in self.missing if page >= start), default=None)
        if first is None:
            return None
        end = first
        while end in self.missing and end < first + limit:
            end += 1
        return PageRange(first, end - first)

    def bring(self, prefetcher: SweepPrefetcher, pages: PageRange) -> None:
        self.missing -= set(range(pages.start, pages.end))
        prefetcher.brought(pages)


def test_what_surrounds_the_latest_fault_comes_first() -> None:
    pages = Pages(set(range(TOTAL)))
    prefetcher = SweepPrefetcher(pages.next_missing, TOTAL)
    fault = PageRange(NEIGHBOURHOOD_PAGES * 2 + 10, 4)
    pages.bring(prefetcher, fault)
    prefetcher.faulted(fault)
    base = NEIGHBOURHOOD_PAGES * 2
    assert prefetcher.next_range(64) == PageRange(fault.end, 64)
    assert prefetcher.next_range(64) == PageRange(fault.end + 64, NEIGHBOURHOOD_PAGES - 14 - 64)
    assert prefetcher.next_range(64) == PageRange(base, 10)
    assert prefetcher.next_range(64) == PageRange(0, 64)
    assert prefetcher.next_range(64) == PageRange(64, 64)


def test_fault_at_the_end_guesses_nothing_behind_it() -> None:
    pages = Pages(set(range(TOTAL)))
    prefetcher = SweepPrefetcher(pages.next_missing, TOTAL)
    prefetcher.faulted(PageRange(TOTAL - 1, 1))
    first = prefetcher.next_range(1000)
    assert first is not None
    assert first.end == TOTAL - 1


def test_old_faults_are_forgotten() -> None:
    pages = Pages(set(range(TOTAL)))
    prefetcher = SweepPrefetcher(pages.next_missing, TOTAL)
    for _ in range(MAX_RECENT_FAULTS * 3):
        prefetcher.faulted(PageRange(500, 1))
    assert len(prefetcher._recent) == MAX_RECENT_FAULTS


@given(
    st.sets(st.integers(0, TOTAL - 1)),
    st.lists(st.integers(0, TOTAL - 1), max_size=10),
    st.integers(1, 100),
    st.integers(0, 5),
)
def test_everything_is_guessed_once_and_then_it_ends(
    missing: set[int], faults: list[int], limit: int, in_flight: int
) -> None:
    """Answers come `in_flight` requests late; what is out is filtered as the scheduler does."""
    pages = Pages(set(missing))
    prefetcher = SweepPrefetcher(pages.next_missing, TOTAL)
    out: list[PageRange] = []
    asked: list[int] = []
    for _ in range(5000):
        if faults:
            prefetcher.faulted(PageRange(faults.pop(), 1))
        guess = prefetcher.next_range(limit)
        if guess is None:
            if not out:
                break
            pages.bring(prefetcher, out.pop(0))
            continue
        assert guess.count <= limit
        fresh = [page for page in range(guess.start, guess.end) if not any(page in flight for flight in out)]
        asked += fresh
        if fresh:
            out.append(guess)
        if len(out) > in_flight:
            pages.bring(prefetcher, out.pop(0))
    else:
        raise AssertionError("it never ends")
    assert sorted(asked) == sorted(missing)
    assert not pages.missing


def test_pages_that_never_come_do_not_keep_it_busy() -> None:
    pages = Pages({3, 700})
    prefetcher = SweepPrefetcher(pages.next_missing, TOTAL)
    guesses = 0
    while prefetcher.next_range(64) is not None:
        guesses += 1
        assert guesses < 10
    assert prefetcher.next_range(64) is None
    prefetcher.brought(PageRange(5, 1))
    assert prefetcher.next_range(64) == PageRange(3, 1)


class Leaves(Pages):
    """A hashed snapshot: leaves come along with the pages, and their zero pages are then held."""

    def __init__(self, missing: set[int], zeros: set[int]) -> None:
        super().__init__(missing | zeros)
        self.zeros = zeros
        self.known: set[int] = set()
        self.leaves_sent = 0

    def leaf_missing(self, pages: PageRange) -> bool:
        return any(page // LEAF_PAGES not in self.known for page in range(pages.start, pages.end))

    def bring_with_leaves(self, prefetcher: SweepPrefetcher, pages: PageRange, wanted: bool) -> None:
        for leaf in {page // LEAF_PAGES for page in range(pages.start, pages.end)}:
            self.leaves_sent += wanted
            self.known.add(leaf)
            self.missing -= {page for page in self.zeros if page // LEAF_PAGES == leaf}
        self.bring(prefetcher, pages)


def test_scouts_bring_leaves_before_the_sweep() -> None:
    leaves = 40
    total = leaves * LEAF_PAGES
    zeros = {page for page in range(total) if page % 3}
    pages = Leaves(set(range(total)) - zeros, zeros)
    prefetcher = SweepPrefetcher(pages.next_missing, total, pages.leaf_missing)
    scouts = [prefetcher.next_range(64) for _ in range(SCOUT_LEAVES)]
    assert scouts == [PageRange(leaf * LEAF_PAGES, 1) for leaf in range(SCOUT_LEAVES)]
    for scout in scouts:
        assert scout is not None
        pages.bring_with_leaves(prefetcher, scout, pages.leaf_missing(scout))
    asked: list[int] = [scout.start for scout in scouts if scout]
    while (guess := prefetcher.next_range(64)) is not None:
        asked += range(guess.start, guess.end)
        pages.bring_with_leaves(prefetcher, guess, pages.leaf_missing(guess))
    assert len(asked) == len(set(asked))
    assert set(asked) - {leaf * LEAF_PAGES for leaf in range(leaves)} == {
        page for page in range(total) if page not in zeros and page % LEAF_PAGES
    }
    assert pages.leaves_sent == leaves


def test_a_sweep_goes_on_without_its_scouts_in_the_end() -> None:
    """They never arrive, nor does anything else: every page is guessed, and then it ends."""
    total = (MAX_LEAD_LEAVES + 20) * LEAF_PAGES
    pages = Leaves(set(range(total)), set())
    prefetcher = SweepPrefetcher(
        lambda start, limit: PageRange(start, min(limit, total - start)), total, lambda _: True
    )
    guesses = []
    while (guess := prefetcher.next_range(256)) is not None:
        guesses.append(guess)
        assert len(guesses) < 4000
    assert len({page for guess in guesses for page in range(guess.start, guess.end)}) == len(pages.missing)
    first_swept = next(index for index, guess in enumerate(guesses) if guess.count > 1)
    assert SCOUT_LEAVES <= first_swept <= MAX_LEAD_LEAVES


@given(
    st.sets(st.integers(0, TOTAL - 1)),
    st.sets(st.integers(0, TOTAL - 1)),
    st.lists(st.integers(0, TOTAL - 1), max_size=10),
    st.integers(1, 300),
    st.integers(0, 5),
)
def test_with_scouts_too_everything_comes_and_then_it_ends(
    missing: set[int], zeros: set[int], faults: list[int], limit: int, in_flight: int
) -> None:
    pages = Leaves(missing - zeros, zeros)
    prefetcher = SweepPrefetcher(pages.next_missing, TOTAL, pages.leaf_missing)
    out: list[tuple[PageRange, bool]] = []
    for _ in range(5000):
        if faults:
            prefetcher.faulted(PageRange(faults.pop(), 1))
        guess = prefetcher.next_range(limit)
        if guess is None:
            if not out:
                break
            pages.bring_with_leaves(prefetcher, *out.pop(0))
            continue
        assert guess.count <= limit
        if any(all(page not in flight for flight, _ in out) for page in range(guess.start, guess.end)):
            out.append((guess, pages.leaf_missing(guess)))
        if len(out) > in_flight:
            pages.bring_with_leaves(prefetcher, *out.pop(0))
    else:
        raise AssertionError("it never ends")
    assert not pages.missing
