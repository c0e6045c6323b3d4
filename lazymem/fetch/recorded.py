"""A recorded working set as guesses: its runs in the order of their first touch, each asked for once. Pure.

The set of pages repeats from resume to resume, their order hardly does (REAP, Ustiugov et al., ASPLOS 2021). But a
guest that faults far ahead of us is in a later phase of what was recorded: we go on there, and come back for the rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from lazymem.pages import PageRange


class RecordedSet:
    """`runs`: in order of first touch, not overlapping. `missing` is the sink's `next_missing`."""

    def __init__(self, missing: Callable[[int, int], PageRange | None], runs: Sequence[PageRange]) -> None:
        self._missing = missing
        self._runs = runs
        self._by_start = sorted(range(len(runs)), key=lambda index: runs[index].start)
        self._starts = [runs[index].start for index in self._by_start]
        self._taken = bytearray(len(runs))
        self._at = 0
        self._rest: PageRange | None = None

    def faulted(self, pages: PageRange) -> None:
        """A page of the set that we have not come to: what was touched after it is next."""
        found = bisect_right(self._starts, pages.start) - 1
        if found < 0:
            return
        index = self._by_start[found]
        if index > self._at and pages.start in self._runs[index] and not self._taken[index]:
            self._at = index

    def next_range(self, max_pages: int) -> PageRange | None:
        """The next missing pages of the set. None: all of it was asked for, or is here."""
        while (run := self._rest or self._take()) is not None:
            found = self._missing(run.start, min(max_pages, run.count))
            if found is None or found.start >= run.end:
                self._rest = None
                continue
            end = min(found.end, run.end)
            self._rest = PageRange(end, run.end - end) if end < run.end else None
            return PageRange(found.start, end - found.start)
        return None

    def _take(self) -> PageRange | None:
        index = self._taken.find(0, self._at)
        if index < 0:
            index = self._taken.find(0)
            if index < 0:
                return None
        self._taken[index] = 1
        self._at = index
        return self._runs[index]
