"""First touches: each page once, in order, and what a working set was worth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.touches import Recording, Touches, TouchStatistics

TOTAL = 200


def nothing_held(pages: PageRange) -> bytes:
    return bytes(pages.count)


class Recorded:
    def __init__(self, max_runs: int = 1000) -> None:
        self.firsts = self.fulls = 0
        self.log = Recording(max_runs, self._first, self._full)

    def _first(self) -> None:
        self.firsts += 1

    def _full(self) -> None:
        self.fulls += 1


def test_first_touches_in_their_order() -> None:
    recorded = Recorded()
    touches = Touches(TOTAL, nothing_held)
    touches.read(0, PAGE_SIZE)  # before it is recorded
    touches.record(recorded.log)
    for page, count in ((50, 4), (54, 2), (48, 10), (0, 3), (50, 4)):
        touches.read(page * PAGE_SIZE, count * PAGE_SIZE)
    assert recorded.log.runs() == (PageRange(50, 6), PageRange(48, 2), PageRange(56, 2), PageRange(1, 2))
    assert (recorded.firsts, recorded.fulls) == (1, 0)
    touches.record(None)
    touches.read(100 * PAGE_SIZE, PAGE_SIZE)
    assert len(recorded.log.runs()) == 4
    assert touches.statistics().touched == 14


def test_a_part_of_a_page_is_a_touch_of_it() -> None:
    recorded = Recorded()
    touches = Touches(TOTAL, nothing_held)
    touches.record(recorded.log)
    touches.read(10 * PAGE_SIZE + 4095, 2)
    assert recorded.log.runs() == (PageRange(10, 2),)


def test_written_pages_are_wanted_only_in_part() -> None:
    """Nobody needs to fetch what is overwritten whole; the pages at the ends are merged, so they were needed."""
    recorded = Recorded()
    touches = Touches(TOTAL, nothing_held)
    touches.record(recorded.log)
    touches.written(10 * PAGE_SIZE + 5, 3 * PAGE_SIZE)  # part of 10, all of 11 and 12, part of 13
    touches.written(20 * PAGE_SIZE, 2 * PAGE_SIZE)
    touches.written(30 * PAGE_SIZE + 7, 10)
    touches.read(0, 40 * PAGE_SIZE)
    assert recorded.log.runs()[:3] == (PageRange(10, 1), PageRange(13, 1), PageRange(30, 1))
    assert not {11, 12, 20, 21} & {page for run in recorded.log.runs() for page in range(run.start, run.end)}


def test_a_recording_is_bounded() -> None:
    recorded = Recorded(max_runs=3)
    touches = Touches(TOTAL, nothing_held)
    touches.record(recorded.log)
    for page in range(0, 100, 2):
        touches.read(page * PAGE_SIZE, PAGE_SIZE)
    assert recorded.log.runs() == (PageRange(0, 1), PageRange(2, 1), PageRange(4, 1))
    assert (recorded.firsts, recorded.fulls) == (1, 1)


def test_what_a_set_was_worth() -> None:
    held = bytearray(TOTAL)
    held[10:14] = b"\1\2\1\1"
    touches = Touches(TOTAL, lambda pages: bytes(held[pages.start : pages.end]), (PageRange(10, 5), PageRange(100, 10)))
    assert touches.statistics() == TouchStatistics(touched=0, set_pages=15, set_touched=0, set_ready=0)
    touches.read(12 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert touches.statistics() == TouchStatistics(touched=8, set_pages=15, set_touched=3, set_ready=2)
    held[100:110] = b"\1" * 10
    touches.read(100 * PAGE_SIZE, PAGE_SIZE)
    touches.read(100 * PAGE_SIZE, PAGE_SIZE)
    assert touches.statistics() == TouchStatistics(touched=9, set_pages=15, set_touched=4, set_ready=3)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, TOTAL * PAGE_SIZE - 1), st.integers(1, 20 * PAGE_SIZE))),
    st.sets(st.integers(0, TOTAL - 1)),
    st.sets(st.integers(0, TOTAL - 1)),
)
def test_as_a_set_of_pages_would_have_it(steps: list[tuple[bool, int, int]], in_set: set[int], held: set[int]) -> None:
    recorded = Recorded()
    touches = Touches(
        TOTAL,
        lambda pages: bytes(page in held for page in range(pages.start, pages.end)),
        [PageRange(page, 1) for page in in_set],
    )
    touches.record(recorded.log)
    seen: set[int] = set()
    order: list[int] = []
    for is_read, offset, length in steps:
        end = min(offset + length, TOTAL * PAGE_SIZE)
        pages = range(offset // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1)
        if is_read:
            touches.read(offset, end - offset)
            fresh = [page for page in pages if page not in seen]
        else:
            touches.written(offset, end - offset)
            whole = {page for page in pages if page * PAGE_SIZE >= offset and (page + 1) * PAGE_SIZE <= end}
            fresh = [page for page in pages if page not in seen and page not in whole]
            seen |= whole
        order += fresh
        seen |= set(fresh)
    assert [page for run in recorded.log.runs() for page in range(run.start, run.end)] == order
    found = touches.statistics()
    assert found.touched == len(order)
    assert found.set_pages == len(in_set)
    assert found.set_touched == len(in_set & set(order))
    assert found.set_ready == len(in_set & set(order) & held)
