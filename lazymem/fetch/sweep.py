"""One sweep after the other over whatever is missing, until nothing is, or until a sweep brought nothing. Pure.

Of a hashed snapshot the sweep is led by scouts: one page of each leaf of digests that is not here yet, so that leaf
comes, once, before the sweep does, which then asks for no page that the digests say is zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lazymem.digests import LEAF_PAGES
from lazymem.pages import PageRange

SCOUT_LEAVES = 16
"""Scouted in one go, once fewer than so many are left before the sweep: 64 KiB of digests, for 16 MiB of RAM."""

MAX_LEAD_LEAVES = 128
"""Where scouts take longer than the sweep they go further ahead, up to here: 512 KiB of digests. A sweep that catches
up even so goes on without them."""

LeafMissing = Callable[[PageRange], bool]
"""`PageSink.missing_leaves`: whether a fetch of these pages brings leaves that are not here."""


class Sweep:
    """`missing` is the sink's `next_missing`, `maybe_leaf_missing` its `missing_leaves`; without that there are no
    scouts."""

    def __init__(
        self,
        missing: Callable[[int, int], PageRange | None],
        total_pages: int,
        maybe_leaf_missing: LeafMissing | None = None,
    ) -> None:
        self._missing = missing
        self._total_pages = total_pages
        self._maybe_leaf_missing = maybe_leaf_missing
        self._cursor = 0
        self._scout = 0  # leaves before it need no scout any more
        self._lead: deque[int] = deque()  # ends of leaves with missing pages, between the sweep and the scouts
        self._scouts_due = 0
        self._brought = False

    def faulted(self, pages: PageRange) -> None:
        """A sweep goes its way whatever the guest does."""

    def brought(self, pages: PageRange) -> None:
        self._brought = True

    def next_range(self, max_pages: int) -> PageRange | None:
        return self._next_scout() or self._next_swept(max_pages)

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
