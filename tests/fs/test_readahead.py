"""Refused read-ahead: only where it pays, and no page twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazymem.fs.readahead import ReadAheads
from lazymem.pages import PAGE_SIZE

TOTAL = 128


class Held:
    """What is at hand, and whether we guess better than the kernel."""

    def __init__(self) -> None:
        self.pages: set[int] = set()
        self.guessing_better = True
        self.well_guessed: set[int] = set()
        self.aheads = ReadAheads(
            TOTAL, self.at_hand, lambda pages: self.guessing_better and pages.start not in self.well_guessed
        )

    def at_hand(self, offset: int, size: int) -> bool:
        return self.pages.issuperset(range(offset // PAGE_SIZE, (offset + size) // PAGE_SIZE))

    def refuses(self, page: int, count: int) -> bool:
        return self.aheads.refuses(page * PAGE_SIZE, count * PAGE_SIZE)


def test_read_ahead_of_missing_pages_is_refused_while_a_guessing_better() -> None:
    held = Held()
    held.pages = set(range(32, 64))
    assert held.refuses(0, 32)
    assert not held.refuses(32, 32), "it is at hand"
    assert held.refuses(63, 2)
    assert not held.refuses(5, 1), "somebody waits for it"
    held.well_guessed = {100}
    assert not held.refuses(100, 4), "by the kernel"
    held.guessing_better = False
    assert not held.refuses(96, 32)


def test_everything_is_refused_while_it_is_recorded() -> None:
    held = Held()
    held.guessing_better = False
    held.pages = set(range(TOTAL))
    held.aheads.refuse_everything(True)
    assert held.refuses(0, 32)
    assert not held.refuses(7, 1)
    held.aheads.refuse_everything(False)
    assert not held.refuses(32, 32)


@given(st.lists(st.tuples(st.integers(0, TOTAL - 1), st.integers(1, 40), st.booleans())))
def test_no_page_is_refused_twice(reads: list[tuple[int, int, bool]]) -> None:
    """A kernel whose folios are larger than a page asks for a whole one again, and must get it."""
    held = Held()
    refused: set[int] = set()
    for page, count, everything in reads:
        held.aheads.refuse_everything(everything)
        pages = set(range(page, min(page + count, TOTAL)))
        if held.refuses(page, len(pages)):
            assert len(pages) > 1
            assert not pages & refused
            refused |= pages
