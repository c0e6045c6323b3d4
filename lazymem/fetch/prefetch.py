"""What to bring before it is asked for: guesses only, pure; the scheduler asks when it has nothing better to do.

`--prefetch all`: first what surrounds the guest's own latest faults (a guest reads on near where it read), then
one sweep after the other over whatever is missing. It ends when nothing is missing, or when a sweep brought nothing.

Of a hashed snapshot the sweep is led by scouts: one page of each leaf of digests that is not here yet, so that leaf
comes, once, before the sweep does, which then asks for no page that the digests say is zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from lazymem.digests import LEAF_PAGES
from lazymem.pages import PageRange

NEIGHBOURHOOD_PAGES = 128
"""Aligned block of 512 KiB around a fault: a huge page's quarter, so that QEMU's read-ahead of 2 MiB stays ahead of it
by four requests only."""

MAX_RECENT_FAULTS = 32
"""Older neighbourhoods are left to the sweep: the guest has moved on."""

SCOUT_LEAVES = 16
"""Scouted in one go, once fewer than so many are left before the sweep: 64 KiB of digests, for 16 MiB of RAM."""

MAX_LEAD_LEAVES = 128
"""Where scouts take longer than the sweep they go further ahead, up to here: 512 KiB of digests. A sweep that catches
up even so goes on without them."""

MissingFrom = Callable[[int, int], PageRange | None]
"""`PageSink.next_missing`: first missing run at or behind a page, at most so long."""

LeafMissing = Callable[[PageRange], bool]
"""`PageSink.missing_leaves`: whether a fetch of these pages brings leaves that are not here."""


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

        Never gives a page more than twice unless `brought` was called in between, so asking until None comes ends.
        """
        ...


class SweepPrefetcher:
    """Neighbourhoods of the latest faults, then sweeps. `missing` is the sink's `next_missing`, `maybe_leaf_missing`
    its `missing_leaves`; without that there are no scouts."""

    def __init__(self, missing: MissingFrom, total_pages: int, maybe_leaf_missing: LeafMissing | None = None) -> None:
        self._missing = missing
        self._total_pages = total_pages
        self._maybe_leaf_missing = maybe_leaf_missing
        self._recent: deque[tuple[int, int]] = deque(maxlen=MAX_RECENT_FAULTS)
        self._cursor = 0
        self._scout = 0  # leaves before it need no scout any more
        self._lead: deque[int] = deque()  # ends of leaves with missing pages, between the sweep and the scouts
        self._scouts_due = 0
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
        return self._next_near(max_pages) or self._next_scout() or self._next_swept(max_pages)

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

    def _next_scout(self) -> PageRange | None:
        if self._maybe_leaf_missing is None:
            return None
        while self._lead and self._lead[0] <= self._cursor:
            self._lead.popleft()
        if not self._scouts_due and len(self._lead) < SCOUT_LEAVES:
            self._scouts_due = SCOUT_LEAVES
        return self._send_scout()

    def _send_scout(self) -> PageRange | None:
        """One page of the next unknown leaf, if scouts are due; leaves that are known already count as scouted."""
        while self._scouts_due and self._scout < self._total_pages:
            found = self._missing(self._scout, 1)
            if found is None:
                self._scout = self._total_pages
                break
            self._scouts_due -= 1
            self._scout = (found.start // LEAF_PAGES + 1) * LEAF_PAGES
            self._lead.append(self._scout)
            if self._unknown(found):
                return found
        self._scouts_due = 0
        return None

    def _unknown(self, pages: PageRange) -> bool:
        return self._maybe_leaf_missing is not None and self._maybe_leaf_missing(pages)

    def _next_swept(self, max_pages: int) -> PageRange | None:
        found = self._missing(self._cursor, max_pages) if self._cursor < self._total_pages else None
        if found is None and self._brought:
            self._brought = False
            self._scout = 0
            self._lead.clear()
            found = self._missing(0, max_pages)
        elif found is not None and self._unknown(found) and len(self._lead) < MAX_LEAD_LEAVES:
            self._scouts_due = 1  # its own is on its way; meanwhile one further ahead
            maybe_scout = self._send_scout()
            if maybe_scout is not None:
                return maybe_scout
        self._cursor = self._total_pages if found is None else found.end
        return found
