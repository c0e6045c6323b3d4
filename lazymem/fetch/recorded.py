"""A recorded working set as guesses: its runs in the order of their first touch, each asked for once. Pure.

The set of pages repeats from resume to resume, their order hardly does (REAP, Ustiugov et al., ASPLOS 2021). So a fault
far ahead of us says nothing about what comes next: going on from there was tried, and tripled what a guest waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lazymem.fetch.sink import MissingOf
from lazymem.pages import PageRange

BLOCK_PAGES = 32
"""128 KiB, what the kernel reads around a touch. A block that is here as a whole goes into the kernel's cache in one
READ; of one with holes each page that is touched costs a READ of its own."""


class RecordedSet:
    """`runs`: in order of first touch, not overlapping. `missing` is the sink's `next_missing`. `whole_blocks`:
    whether what surrounds a run is brought along, to the borders of its aligned blocks."""

    def __init__(
        self,
        missing: MissingOf,
        runs: Sequence[PageRange],
        whole_blocks: Callable[[], bool] = lambda: False,
    ) -> None:
        self._missing = missing
        self._whole_blocks = whole_blocks
        self._coming = iter(runs)
        self._rest: PageRange | None = None

    def next_range(self, max_pages: int) -> PageRange | None:
        """The next missing pages of the set. None: all of it was asked for, or is here."""
        while (run := self._rest or self._next_run()) is not None:
            found = self._missing(run, max_pages)
            rest = 0 if found is None else run.end - found.end
            self._rest = PageRange(run.end - rest, rest) if rest else None
            if found is not None:
                return found
        return None

    def _next_run(self) -> PageRange | None:
        run = next(self._coming, None)
        if run is None or not self._whole_blocks():
            return run
        start = run.start - run.start % BLOCK_PAGES
        return PageRange(start, -(-run.end // BLOCK_PAGES) * BLOCK_PAGES - start)
