"""Where pages of a guest that still runs elsewhere go as they come: two sparse files, which `candidates` reads.

Bytes first, then the map, as everywhere. Their folder has its name only until the mount has opened it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from lazymem.errors import StoreError
from lazymem.pages import PAGE_SHIFT, PageRun
from lazymem.store import folders
from lazymem.store.candidates import HAS_BYTES, IS_ZERO, MAP_NAME, PAGES_NAME
from lazymem.store.pagefile import leave_room, pwrite_all

PREFIX = ".candidates-"
"""Of a folder's name, so that what a killed process left is known for what it is."""

TIMES_LEFT_FREE = 2
"""Of what fetched pages leave free: what the guest touches first is fetched and kept before candidates are decided."""


class CandidateWriter:
    """Makes the folder ``.candidates-NAME`` in `beside`. Blocking; for one thread at a time."""

    def __init__(self, beside: Path, name: str, size_bytes: int) -> None:
        """
        Raises:
            StoreError: the disk refused; nothing is left.
        """
        self.folder = beside / f"{PREFIX}{name}"
        self._page_count = size_bytes >> PAGE_SHIFT
        self._fds: list[int] = []
        try:
            folders.ensure_folder(beside)
            folders.make_folder(self.folder)
            for file, size in ((PAGES_NAME, size_bytes), (MAP_NAME, self._page_count)):
                folders.create_file(self.folder / file, size)
                self._fds.append(folders.open_file(self.folder / file, size))
        except OSError as error:
            self.close()
            raise StoreError(f"cannot make {self.folder}: {error.strerror}") from error

    def forget_name(self) -> None:
        """The mount has the files open: from here on they go with whoever has them open, however that ends."""
        remove_candidates(self.folder)

    def write(self, runs: Sequence[PageRun]) -> int:
        """What came last is what counts. Returns how many pages came with bytes.

        Raises:
            StoreError: the disk is nearly full, and what is here stays; or it refused, and all of it is gone; or a
                page is none of this RAM.
        """
        try:
            leave_room(self._fds[0], TIMES_LEFT_FREE)
        except OSError as error:
            raise StoreError(f"no more pages are kept ahead of the guest: {error.strerror}") from error
        try:
            return sum([self._write(run) for run in runs])
        except OSError as error:
            with contextlib.suppress(OSError):  # what a disk keeps that refuses this too, goes with the mount
                self._discard()
            raise StoreError(f"pages that came ahead of the guest cannot be kept: {error.strerror}") from error

    def _discard(self) -> None:
        """The cache needs that room."""
        for fd in self._fds:
            size = os.fstat(fd).st_size
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)

    def _write(self, run: PageRun) -> int:
        pages_fd, map_fd = self._fds
        pages = run.pages
        if pages.end > self._page_count:
            raise StoreError(f"page {pages.end - 1} is outside a RAM of {self._page_count} pages")
        if run.data is None:
            pwrite_all(map_fd, bytes([IS_ZERO]) * pages.count, pages.start)
            return 0
        pwrite_all(pages_fd, run.data, pages.offset_bytes)
        pwrite_all(map_fd, bytes([HAS_BYTES]) * pages.count, pages.start)
        return pages.count

    def close(self) -> None:
        """Nothing of it is left, but what the mount has open."""
        while self._fds:
            os.close(self._fds.pop())
        remove_candidates(self.folder)


def remove_candidates(folder: Path) -> None:
    """The folder of a `CandidateWriter`, if it is there and is one."""
    if folder.name.startswith(PREFIX) and folder.is_absolute():
        folders.remove_folder(folder)
