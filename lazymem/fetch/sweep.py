"""One sweep after the other over whatever is missing, until nothing is, or until a sweep brought nothing. Pure.

A large RAM is swept in several places by turns. What is in it comes in stretches, of text here and of noise there, and
a window that is counted in pages so has some of each on the wire: a link of 100 Mb/s and 20 ms then stands still for
less than half as long.

Of a hashed snapshot the sweep is led by scouts: one page of each leaf of digests that is not here yet, so that leaf
comes, once, before the sweep does, which then asks for no page that the digests say is zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

from lazymem.digests import LEAF_PAGES
from lazymem.fetch.sink import MissingOf
from lazymem.pages import PageRange

SCOUT_LEAVES = 16
"""Scouted in one go, once fewer than so many are left before the sweep: 64 KiB of digests, for 16 MiB of RAM."""

MAX_LEAD_LEAVES = 128
"""Where scouts take longer than the sweep they go further ahead, up to here: 512 KiB of digests. A sweep that catches
up even so goes on without them."""

PLACES = 4
PLACE_PAGES = 32
"""Asked for in one place before the next one has its turn: what compresses as one frame on a slow link."""

LEAST_LEAVES_A_PLACE = 16
"""Of less, all of it is on its way at once."""

LeafMissing = Callable[[PageRange], bool]
"""`PageSink.missing_leaves`: whether a fetch of these pages brings leaves that are not here."""


class Sweep:
    """Of `pages`, whole leaves but for the last. `missing` is the sink's `next_missing`, `maybe_leaf_missing` its
    `missing_leaves`; without that there are no scouts."""

    def __init__(
        self,
        missing: MissingOf,
        pages: PageRange,
        maybe_leaf_missing: LeafMissing | None = None,
    ) -> None:
        self._missing_in = missing
        self._start, self._end = pages.start, pages.end
        self._maybe_leaf_missing = maybe_leaf_missing
        self._cursor = self._start
        self._scout = self._start  # leaves before it need no scout any more
        self._lead: deque[int] = deque()  # ends of leaves with missing pages, between the sweep and the scouts
        self._scouts_due = 0
        self._brought = False

    def faulted(self, pages: PageRange) -> None:
        """A sweep goes its way whatever the guest does."""

    def brought(self, pages: PageRange) -> None:
        self._brought = True

    def _missing(self, start: int, limit: int) -> PageRange | None:
        return self._missing_in(PageRange(start, self._end - start), limit) if start < self._end else None

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
        while self._scouts_due and self._scout < self._end:
            found = self._missing(self._scout, 1)
            if found is None:
                self._scout = self._end
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
        found = self._missing(self._cursor, max_pages)
        if found is None and self._brought:
            self._brought = False
            self._scout = self._start
            self._lead.clear()
            found = self._missing(self._start, max_pages)
        elif found is not None and self._unknown(found) and len(self._lead) < MAX_LEAD_LEAVES:
            self._scouts_due = 1  # its own is on its way; meanwhile one further ahead
            maybe_scout = self._send_scout()
            if maybe_scout is not None:
                return maybe_scout
        if found is not None:
            found = _within_leaf(found)
        self._cursor = self._end if found is None else found.end
        return found


def _within_leaf(pages: PageRange) -> PageRange:
    """As far as its leaf: a server answers with a frame for each, and two halves are two frames."""
    return PageRange(pages.start, min(pages.count, LEAF_PAGES - pages.start % LEAF_PAGES))


class Sweeps:
    """Several, which take turns. Made by `sweep_of`."""

    def __init__(self, sweeps: Sequence[Sweep]) -> None:
        self._sweeps = deque(sweeps)
        self._given_pages = 0  # by the first of them, since its turn began

    def faulted(self, pages: PageRange) -> None:
        """As `Sweep.faulted`."""

    def brought(self, pages: PageRange) -> None:
        for sweep in self._sweeps:
            sweep.brought(pages)

    def next_range(self, max_pages: int) -> PageRange | None:
        for _ in range(len(self._sweeps)):
            found = self._sweeps[0].next_range(max_pages)
            if found is not None:
                self._given_pages += found.count
            if found is None or self._given_pages >= PLACE_PAGES:
                self._given_pages = 0
                self._sweeps.rotate(-1)
            if found is not None:
                return found
        return None


def sweep_of(
    missing: MissingOf,
    total_pages: int,
    maybe_leaf_missing: LeafMissing | None = None,
) -> Sweeps:
    """All of a RAM; the arguments are `Sweep`'s."""
    leaves = -(-total_pages // LEAF_PAGES)
    places = max(1, min(PLACES, leaves // LEAST_LEAVES_A_PLACE))
    borders = [leaves * place // places * LEAF_PAGES for place in range(places)] + [total_pages]
    return Sweeps(
        [Sweep(missing, PageRange(start, end - start), maybe_leaf_missing) for start, end in pairwise(borders)]
    )
