"""A recorded working set as guesses: its runs in the order of their first touch, each asked for once. Pure.

The set of pages repeats from resume to resume, their order hardly does (REAP, Ustiugov et al., ASPLOS 2021). So a fault
far ahead of us says nothing about what comes next: going on from there was tried, and tripled what a guest waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lazymem.pages import PageRange


class RecordedSet:
    """`runs`: in order of first touch, not overlapping. `missing` is the sink's `next_missing`."""

    def __init__(self, missing: Callable[[int, int], PageRange | None], runs: Sequence[PageRange]) -> None:
        self._missing = missing
        self._coming = iter(runs)
        self._rest: PageRange | None = None

    def next_range(self, max_pages: int) -> PageRange | None:
        """The next missing pages of the set. None: all of it was asked for, or is here."""
        while (run := self._rest or next(self._coming, None)) is not None:
            found = self._missing(run.start, min(max_pages, run.count))
            if found is None or found.start >= run.end:
                self._rest = None
                continue
            end = min(found.end, run.end)
            self._rest = PageRange(end, run.end - end) if end < run.end else None
            return PageRange(found.start, end - found.start)
        return None
