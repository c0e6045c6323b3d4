"""Fetched pages given up, so that the disk has room for what a guest writes: they can come again, that cannot."""

from __future__ import annotations

import contextlib

import trio

from lazymem.errors import StoreError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.cachefolder import CacheFolder
from lazymem.store.pagemap import SET, UNSET, PageMap

LOOK_PAGES = 4096
LOOKS_A_TURN = 32
"""A look is some microseconds of the loop that serves faults; after so many it gets a turn."""

_WITH_DATA = bytes(state == SET for state in range(256))
_ONE_OR_NONE = bytes([0]) + bytes([1]) * 255


class Shedder:
    """Of one cache. First what this run wrote over and needs no more, then whatever stands in the file, in order.

    Whoever reads such a page meanwhile, in any process, finds a page that does not have its digest, and fetches it.
    """

    def __init__(self, cache: CacheFolder, written: PageMap) -> None:
        self._held = cache.held
        self._pages = cache.pages
        self._written = written
        self._at = 0
        self.shed_pages = 0

    async def shed(self, most_bytes: int) -> int:
        """Free room of about so many bytes; 0: there is nothing to be had.

        Raises:
            StoreError: the file system cannot give a part of a file back.
        """
        wanted = max(1, most_bytes // PAGE_SIZE)
        victims = (await self._pick(0, wanted, overwritten=True))[0]
        if not victims:
            victims, self._at = await self._pick(self._at, wanted, overwritten=False)
        if not victims:
            victims, self._at = await self._pick(0, wanted, overwritten=False)
        for run in victims:
            with contextlib.suppress(StoreError):  # then it is found wrong when it is read
                self._held.set(run, UNSET)
        if victims:
            await self._pages.punch(victims)
        count = sum(run.count for run in victims)
        self.shed_pages += count
        return count * PAGE_SIZE

    async def _pick(self, at: int, wanted: int, *, overwritten: bool) -> tuple[list[PageRange], int]:
        """At most `wanted` pages from page `at` on, and where to go on."""
        found: list[PageRange] = []
        total = self._held.pages
        looks = 0
        while at < total and wanted > 0:
            looks += 1
            if looks % LOOKS_A_TURN == 0:
                await trio.lowlevel.checkpoint()
            look = PageRange(at, min(LOOK_PAGES, total - at))
            states = self._held.states(look).translate(_WITH_DATA)
            if overwritten:
                states = _both(states, self._written.states(look).translate(_ONE_OR_NONE))
            at = look.end
            start = states.find(1)
            while start >= 0 and wanted > 0:
                end = states.find(0, start)
                count = min((look.count if end < 0 else end) - start, wanted)
                found.append(PageRange(look.start + start, count))
                wanted -= count
                at = look.end if wanted else look.start + start + count
                start = states.find(1, start + count)
        return found, at


def _both(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "little") & int.from_bytes(right, "little")).to_bytes(len(left), "little")
