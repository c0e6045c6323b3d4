"""Guesses around the guest's latest faults, wider while faults stay near each other, narrower while they do not. Pure.

Source: the "bubbling" of Hines and Gopalan, "Post-copy based live virtual machine migration using adaptive pre-paging
and dynamic self-ballooning", VEE 2009: pages around the latest faults first, from the fault outwards. Theirs grows
until the next fault; ours ends where it stops paying, since a sweep, or a link that somebody pays for, comes after it.

Outwards means over all of the latest faults: what is nearest to each of them comes before what is wider around any. A
guest that has just been resumed touches some pages in each of many places, and over a slow link there is time for few
pages between one fault and the next.

What a guess was worth cannot be seen (pages that are here no longer fault), but its need can: while faults go on in or
beside where faults have been, the guest reads on faster than we guess.
"""

from __future__ import annotations

from collections import deque

from lazymem.fetch.sink import MissingOf
from lazymem.pages import PageRange

MIN_REACH_PAGES = 32
"""128 KiB: what the kernel reads around a touch anyway."""

MAX_REACH_PAGES = 512
"""2 MiB, a huge page: a program's array, or a file's piece, seldom has more in a row of a guest's physical memory."""

RINGS = (MAX_REACH_PAGES // MIN_REACH_PAGES).bit_length()

START_RATE = 0.5
"""128 pages, an aligned block of 512 KiB."""

NEAR_RATE = 0.4
"""Less is what faults at random within 256 MiB make: of 512 blocks 96 are warm."""

RATE_WEIGHT = 1 / 16
"""A phase of so many faults changes what is guessed."""

NEAR_SHIFT = 7
"""Faults are near each other in the same or the next block of 512 KiB."""

MAX_WARM_BLOCKS = 96
"""Those of the latest faults, each with its two neighbours."""

MAX_RECENT_FAULTS = 32
"""Older neighbourhoods are left to the sweep: the guest has moved on."""


class Neighbourhoods:
    """`missing` is the sink's `next_missing`. While faults are far apart nothing is guessed."""

    def __init__(self, missing: MissingOf, total_pages: int) -> None:
        self._missing = missing
        self._total_pages = total_pages
        # By distance: the rest of a fault's smallest block, the other half of the next larger one, and so on.
        self._rings: tuple[deque[tuple[int, int]], ...] = tuple(deque(maxlen=MAX_RECENT_FAULTS) for _ in range(RINGS))
        self._warm: dict[int, None] = {}
        self._rate = START_RATE

    @property
    def reach_pages(self) -> int:
        """Size of the aligned block around a fault: a power of two, from 32 to 512."""
        return MIN_REACH_PAGES << int(self._rate * 4.999)

    @property
    def is_near(self) -> bool:
        """Whether the latest faults were near each other."""
        return self._rate >= NEAR_RATE

    def faulted(self, pages: PageRange) -> None:
        self._note(pages.start >> NEAR_SHIFT)
        if not self.is_near:
            return  # any other page is as likely to be the next
        size, reach = MIN_REACH_PAGES, self.reach_pages
        base = pages.start - pages.start % size
        self._recall(0, base, pages.start)
        self._recall(0, pages.end, base + size)  # what is behind it comes first
        for ring in range(1, RINGS):
            if size >= reach:
                break
            self._recall(ring, base ^ size, (base ^ size) + size)
            base &= ~size
            size *= 2

    def _recall(self, ring: int, start: int, end: int) -> None:
        """Guess these before anything else of the ring."""
        end = min(end, self._total_pages)
        if start < end:
            self._rings[ring].append((start, end))

    def _note(self, block: int) -> None:
        warm = self._warm
        self._rate += ((block in warm) - self._rate) * RATE_WEIGHT
        for near in (block - 1, block + 1, block):
            warm.pop(near, None)
            warm[near] = None
        while len(warm) > MAX_WARM_BLOCKS:
            del warm[next(iter(warm))]

    def nearest_range(self, max_pages: int) -> PageRange | None:
        """Of the smallest blocks only: of the latest fault first what is behind it, then what is before it."""
        return self._next_of(self._rings[0], max_pages)

    def next_range(self, max_pages: int) -> PageRange | None:
        """The nearest, then wider around the latest faults, then wider still."""
        for recent in self._rings:
            found = self._next_of(recent, max_pages)
            if found is not None:
                return found
        return None

    def _next_of(self, recent: deque[tuple[int, int]], max_pages: int) -> PageRange | None:
        while recent:
            start, end = recent.pop()
            found = self._missing(PageRange(start, end - start), max_pages)
            if found is None:
                continue
            if found.end < end:
                recent.append((found.end, end))
            return found
        return None
