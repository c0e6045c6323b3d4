"""Guesses: near the guest's own faults first, then everything that is missing, and then an end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazymem.fetch.prefetch import MAX_RECENT_FAULTS, NEIGHBOURHOOD_PAGES, SweepPrefetcher
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
