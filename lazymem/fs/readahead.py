"""Which READs of the kernel are refused, so that it asks again for just the page that somebody waits for.

A READ of more than a page is the kernel's guess around a touch, and does not tell the touched page. When it fails, its
pages stay out of the kernel's cache, and nobody hears of it: whoever needs one of them makes the kernel send a READ of
that page. So a refusal costs a request, and tells us what is touched. It pays in three places:

- while a working set is on its way, since we guess better than the kernel then. With MADV_HUGEPAGE, as QEMU has it, a
  touch makes it ask for 4 MiB, in up to 32 READs, which would all go before the set;
- while everything else is on its way over a slow link: the page that is touched, and what we guess around it, then come
  in a round trip, and the kernel's 2 MiB in ten. Not where the guest reads page after page, as the kernel has it;
- while touches are recorded, of which each page then counts by itself.

A page is refused once at most: whatever a kernel may do, its second READ is answered. READs of one page are never
refused. Pure; all calls on trio's thread. See record 0008.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange

SLOW_SECONDS = 0.005
"""Round trips from here on are those of a slow link. Over a faster one, each touched page of refused read-ahead costs
the processors as much as is won: a guest resumed at 1 ms and 1 Gb/s was not faster for it."""


class ReadAheads:
    """`at_hand(offset, size)`: whether a READ of these bytes needs no fetch. `guessing_better(pages)`:
    whether our own guesses are on their way, and better than the kernel's. `on_refused` is told of
    each READ that is refused."""

    def __init__(
        self,
        total_pages: int,
        at_hand: Callable[[int, int], bool],
        guessing_better: Callable[[PageRange], bool],
        on_refused: Callable[[PageRange], None] = lambda pages: None,
    ) -> None:
        self._at_hand = at_hand
        self._guessing_better = guessing_better
        self._on_refused = on_refused
        self._everything = False
        self._refused = mmap.mmap(-1, total_pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def refuse_everything(self, refuse: bool) -> None:
        """Also what is at hand: to see each page that is touched."""
        self._everything = refuse

    def refuses(self, offset: int, size: int) -> bool:
        """Whether to refuse this READ; it is then noted as refused."""
        if size <= PAGE_SIZE:
            return False
        start, end = offset >> PAGE_SHIFT, (offset + size + PAGE_SIZE - 1) >> PAGE_SHIFT
        if not (self._everything or self._guessing_better(PageRange(start, end - start))):
            return False
        if self._refused.find(b"\1", start, end) >= 0:
            return False
        if not self._everything and self._at_hand(offset, size):
            return False
        self._refused[start:end] = b"\1" * (end - start)
        self._on_refused(PageRange(start, end - start))
        return True
