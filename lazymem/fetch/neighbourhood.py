"""Guesses around the guest's latest faults, wider while faults stay near each other, narrower while they do not. Pure.

Source: the "bubbling" of Hines and Gopalan, "Post-copy based live virtual machine migration using adaptive pre-paging
and dynamic self-ballooning", VEE 2009: pages around the latest faults first, from the fault outwards. Theirs grows
until the next fault; ours ends where it stops paying, since a sweep, or a link that somebody pays for, comes after it.

What a guess was worth cannot be seen (pages that are here no longer fault), but its need can: while faults go on in or
beside where faults have been, the guest reads on faster than we guess.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lazymem.pages import PageRange

MIN_REACH_PAGES = 32
"""128 KiB: what the kernel reads around a touch anyway, so that nothing is guessed any more."""

MAX_REACH_PAGES = 512
"""2 MiB, a huge page: a program's array, or a file's piece, seldom has more in a row of a guest's physical memory."""

START_RATE = 0.5
"""128 pages, an aligned block of 512 KiB."""

RATE_WEIGHT = 1 / 16
"""A phase of so many faults changes what is guessed."""

NEAR_SHIFT = 7
"""Faults are near each other in the same or the next block of 512 KiB."""

MAX_WARM_BLOCKS = 96
"""Those of the latest faults, each with its two neighbours."""

MAX_RECENT_FAULTS = 32
"""Older neighbourhoods are left to the sweep: the guest has moved on."""


class Neighbourhoods:
    """`missing` is the sink's `next_missing`."""

    def __init__(self, missing: Callable[[int, int], PageRange | None], total_pages: int) -> None:
        self._missing = missing
        self._total_pages = total_pages
        self._recent: deque[tuple[int, int]] = deque(maxlen=MAX_RECENT_FAULTS)
        self._warm: dict[int, None] = {}
        self._rate = START_RATE

    @property
    def reach_pages(self) -> int:
        """Size of the aligned block around a fault: a power of two, from 32 to 512."""
        return MIN_REACH_PAGES << int(self._rate * 4.999)

    def faulted(self, pages: PageRange) -> None:
        self._note(pages.start >> NEAR_SHIFT)
        reach = self.reach_pages
        base = pages.start - pages.start % reach
        end = min(base + reach, self._total_pages)
        if base < pages.start:
            self._recent.append((base, pages.start))
        if pages.end < end:
            self._recent.append((pages.end, end))

    def _note(self, block: int) -> None:
        warm = self._warm
        self._rate += ((block in warm) - self._rate) * RATE_WEIGHT
        for near in (block - 1, block + 1, block):
            warm.pop(near, None)
            warm[near] = None
        while len(warm) > MAX_WARM_BLOCKS:
            del warm[next(iter(warm))]

    def next_range(self, max_pages: int) -> PageRange | None:
        """Of the latest fault first what is behind it, then what is before it."""
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
