"""What to bring before it is asked for: guesses only, pure; the scheduler asks when it has nothing better to do.

`--prefetch all`: first what surrounds the guest's own latest faults (a guest reads on near where it read), then
one sweep after the other over whatever is missing. It ends when nothing is missing, or when a sweep brought nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from lazymem.pages import PageRange

NEIGHBOURHOOD_PAGES = 128
"""Aligned block of 512 KiB around a fault: a huge page's quarter, so that QEMU's read-ahead of 2 MiB stays ahead of it
by four requests only."""

MAX_RECENT_FAULTS = 32
"""Older neighbourhoods are left to the sweep: the guest has moved on."""

MissingFrom = Callable[[int, int], PageRange | None]
"""`PageSink.next_missing`: first missing run at or behind a page, at most so long."""


class Prefetcher(Protocol):
    """A strategy. The scheduler tells what happened and asks for the next guess."""

    def faulted(self, pages: PageRange) -> None:
        """The guest demanded `pages`."""
        ...

    def brought(self, pages: PageRange) -> None:
        """Pages were kept, whoever asked for them."""
        ...

    def next_range(self, max_pages: int) -> PageRange | None:
        """The next guess, at most `max_pages` long; pages of it may already be on their way. None: nothing now.

        Never gives a range twice unless `brought` was called in between, so asking until None comes ends.
        """
        ...


class SweepPrefetcher:
    """Neighbourhoods of the latest faults, then sweeps. `missing` is the sink's `next_missing`."""

    def __init__(self, missing: MissingFrom, total_pages: int) -> None:
        self._missing = missing
        self._total_pages = total_pages
        self._recent: deque[tuple[int, int]] = deque(maxlen=MAX_RECENT_FAULTS)
        self._cursor = 0
        self._brought = False

    def faulted(self, pages: PageRange) -> None:
        base = pages.start - pages.start % NEIGHBOURHOOD_PAGES
        end = min(base + NEIGHBOURHOOD_PAGES, self._total_pages)
        if base < pages.start:
            self._recent.append((base, pages.start))
        if pages.end < end:
            self._recent.append((pages.end, end))

    def brought(self, pages: PageRange) -> None:
        self._brought = True

    def next_range(self, max_pages: int) -> PageRange | None:
        return self._next_near(max_pages) or self._next_swept(max_pages)

    def _next_near(self, max_pages: int) -> PageRange | None:
        while self._recent:
            start, end = self._recent.pop()
            found = self._missing(start, min(max_pages, end - start))
            if found is None or found.start >= end:
                continue
            found = PageRange(found.start, min(found.count, end - found.start))
            if found.end < end:
                self._recent.append((found.end, end))
            return found
        return None

    def _next_swept(self, max_pages: int) -> PageRange | None:
        found = self._missing(self._cursor, max_pages) if self._cursor < self._total_pages else None
        if found is None and self._brought:
            self._brought = False
            found = self._missing(0, max_pages)
        self._cursor = self._total_pages if found is None else found.end
        return found
