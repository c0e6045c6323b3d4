"""Locks on ranges of pages: who overlaps waits in the order of coming, who does not never waits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lazymem.pages import PageRange


class _Claim:
    def __init__(self, pages: PageRange, blockers: set[_Claim]) -> None:
        self.pages = pages
        self.blockers = blockers
        self.free = trio.Event()


class RangeLocks:
    """The claims of one RAM. Waits are cancellable; a cancelled one leaves nothing behind."""

    def __init__(self) -> None:
        # Bounded by the writes that the kernel has open at a time (its max_background, and one a waiting thread).
        self._claims: list[_Claim] = []

    @asynccontextmanager
    async def hold(self, pages: PageRange) -> AsyncIterator[None]:
        """Hold `pages` alone. Without a wait, and without a checkpoint, when nobody overlaps."""
        blockers = {c for c in self._claims if c.pages.start < pages.end and pages.start < c.pages.end}
        claim = _Claim(pages, blockers)
        self._claims.append(claim)
        try:
            if blockers:
                await claim.free.wait()
            yield
        finally:
            self._claims.remove(claim)
            for other in self._claims:
                if claim in other.blockers:
                    other.blockers.discard(claim)
                    if not other.blockers:
                        other.free.set()
