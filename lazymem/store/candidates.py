"""Pages of a guest that still ran elsewhere: perhaps right, and believed only once their digest is the frozen page's.

Two files in a folder apart from the cache, sparse: the bytes, and a byte a page that says whether there are any. Who
receives them writes them (`CandidateWriter`) while nothing here looks; the mount has had the files open since its
start, and looks when the source has told the first digest, which it does for a guest that stands. The folder is gone by
then: both have its files open, and whoever dies leaves nothing.

What was looked at is given back to the disk at once, so candidates and the cache together never take more than the RAM.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from lazymem.digests import LEAF_PAGES
from lazymem.errors import StoreError
from lazymem.pages import PAGE_SHIFT, PageRange, PageRun
from lazymem.store import folders
from lazymem.store.fallocate import punch
from lazymem.store.pagefile import pread_all
from lazymem.store.threads import in_thread

PAGES_NAME = "pages"
MAP_NAME = "map"

NONE = 0
HAS_BYTES = 1
IS_ZERO = 2
"""In the map: no candidate, one with its bytes in the pages file, one that is all zero, they say."""

_BORDERS = re.compile(rb"\x00+|\x01+|\x02+")

_KNOWN = bytes(state if state in (HAS_BYTES, IS_ZERO) else NONE for state in range(256))

_THREADS = 2
"""At work on the files: one reads while another gives back."""


class Candidates:
    """The mount's end. Opened when nothing is in it yet. `undecided`: pages that may turn out to be right."""

    def __init__(self, folder: Path, page_count: int) -> None:
        """
        Raises:
            StoreError: it is not there, or not of this RAM.
        """
        self._fds: list[int] = []
        try:
            for name, size in ((PAGES_NAME, page_count << PAGE_SHIFT), (MAP_NAME, page_count)):
                self._fds.append(folders.open_file(folder / name, size))
        except StoreError:
            self.close()
            raise
        self._page_count = page_count
        self._map: bytearray | None = None
        self._threads = trio.CapacityLimiter(_THREADS)
        self._is_over = False
        self.used_pages = 0
        self.refused_pages = 0

    async def begin(self) -> None:
        """Nobody writes any more: look which pages there are. 16 MiB of a map for 64 GiB of RAM.

        Raises:
            StoreError: the disk refused.
        """
        try:
            found = await in_thread(self._threads, pread_all, self._fds[1], self._page_count, 0)
            self._map = bytearray(found.translate(_KNOWN))
        except OSError as error:
            raise StoreError(f"cannot read the map of candidates: {error.strerror}") from error

    def leaves(self) -> list[int]:
        """Leaves with a candidate, in order."""
        assert self._map is not None
        starts = range(0, self._page_count, LEAF_PAGES)
        return [at // LEAF_PAGES for at in starts if self._map[at : at + LEAF_PAGES].strip(b"\0")]

    def decided_parts(self, pages: PageRange) -> list[PageRange]:
        """What of `pages` is worth to be asked for: no candidate of it may still be right."""
        if self._is_over:
            return [pages]
        if self._map is None:
            return []
        return [run for run, state in self._runs(pages) if state == NONE]

    def first_decided(self, start: int, end: int) -> int:
        """First page in ``start ... end - 1`` of which no candidate may still be right, or `end`."""
        if self._is_over:
            return start
        found = -1 if self._map is None else self._map.find(NONE, start, end)
        return end if found < 0 else found

    def in_leaf(self, leaf: int) -> list[tuple[PageRange, bool]]:
        """The runs of candidates in a leaf, in order, each with whether it has bytes."""
        pages = self._leaf(leaf)
        return [(run, state == HAS_BYTES) for run, state in self._runs(pages) if state != NONE]

    def _leaf(self, leaf: int) -> PageRange:
        first = leaf * LEAF_PAGES
        return PageRange(first, min(LEAF_PAGES, self._page_count - first))

    def _runs(self, pages: PageRange) -> Iterator[tuple[PageRange, int]]:
        assert self._map is not None
        states = bytes(self._map[pages.start : pages.end])
        for found in _BORDERS.finditer(states):
            yield PageRange(pages.start + found.start(), found.end() - found.start()), states[found.start()]

    async def read(self, runs: Sequence[PageRange]) -> list[PageRun]:
        """Their bytes, which nobody has verified.

        Raises:
            StoreError: the disk refused.
        """

        def work() -> list[PageRun]:
            return [PageRun(run, pread_all(self._fds[0], run.length_bytes, run.offset_bytes)) for run in runs]

        try:
            return await in_thread(self._threads, work)
        except OSError as error:
            raise StoreError(f"cannot read candidates: {error.strerror}") from error

    def decided(self, leaf: int, *, used: int, refused: int) -> None:
        """Nothing in the leaf is a candidate any more. Others than these nobody needed."""
        assert self._map is not None
        pages = self._leaf(leaf)
        self._map[pages.start : pages.end] = bytes(pages.count)
        self.used_pages += used
        self.refused_pages += refused

    async def give_back(self, pages: PageRange) -> None:
        """The disk's room of pages that are decided."""
        with contextlib.suppress(OSError):  # where a file system cannot do that, all goes in the end
            await in_thread(self._threads, punch, self._fds[0], pages.offset_bytes, pages.length_bytes)

    def finish(self) -> None:
        """What is undecided is no candidate any more, and everything goes."""
        self._is_over = True
        self._map = None
        self.close()

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
