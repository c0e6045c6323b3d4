"""No READ is put aside for long (`readorder`), whatever goes before it.

Whoever waits for one may be somebody whose touches nobody counts: a guest of KVM, a system call of the emulator. Others
may touch what is nearer again and again meanwhile, as long as they find something missing; and what is out may not end,
where a server gives wrong bytes of some pages, say. All calls on trio's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import trio

from lazymem.fs.readorder import ReadOrder

MOST_SECONDS = 0.25
"""Twice this at most. At 1 Gb/s all that the kernel has read at a time comes in a quarter of it."""


class AsideTime:
    """`open_reads`: as of `ReadOrder.maybe_due`. `start`: gets the unique number, the offset and the size of each READ
    that was put aside long enough."""

    def __init__(
        self, maybe_order: ReadOrder | None, open_reads: Collection[int], start: Callable[[int, int, int], None]
    ) -> None:
        self._maybe_order = maybe_order
        self._open_reads = open_reads
        self._start = start
        self._is_watching = False

    def watch(self, nursery: trio.Nursery | None) -> None:
        """One was put aside. The task lasts as long as any is."""
        if not self._is_watching and nursery is not None:
            self._is_watching = True
            nursery.start_soon(self._watch)

    async def _watch(self) -> None:
        order = self._maybe_order
        while order is not None and order.aside:
            before = tuple(order.aside)
            await trio.sleep(MOST_SECONDS)
            for read in order.give_up(before, self._open_reads):
                self._start(read.unique, read.offset, read.size)
        self._is_watching = False
