"""Pages of a snapshot folder on this host, without a server: for tests, and where the file system is already shared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, TreeShape, page_digest
from lazymem.errors import SnapshotError, StoreError
from lazymem.pages import PAGE_SIZE, Fetched, PageRange, PageRun, is_zero
from lazymem.store.pagefile import pread_all


class LocalSource:
    """Implements `source.PageSource` over a file `ram` and, for a hashed snapshot, its file `digests`.

    Without digests it vouches for what it reads, as a server does.

    Raises:
        SnapshotError: a file is missing, unreadable, or of a size that no snapshot has.
    """

    def __init__(self, ram: Path, digests: Path | None = None) -> None:
        self._ram_fd = _open(ram)
        self._digests_fd = -1
        try:
            size = os.fstat(self._ram_fd).st_size
            try:
                self._shape = TreeShape(size)
            except ValueError as error:
                raise SnapshotError(f"{ram} is not a RAM file: {error}") from error
            if digests is not None:
                self._digests_fd = _open(digests)
                if os.fstat(self._digests_fd).st_size != self._shape.file_bytes:
                    raise SnapshotError(f"{digests} does not belong to {ram}: wrong size")
        except SnapshotError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise SnapshotError(f"cannot look at {ram}: {error.strerror}") from error

    @property
    def total_pages(self) -> int:
        return self._shape.pages

    def upper(self) -> bytes:
        """Blocking: the upper level of a hashed snapshot, not verified; empty for an unhashed one."""
        if self._digests_fd < 0:
            return b""
        return pread_all(self._digests_fd, self._shape.upper_bytes, self._shape.upper_offset)

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        for pages in ranges:
            if pages.end > self.total_pages:
                raise StoreError(f"page {pages.end - 1} was asked of a RAM of {self.total_pages} pages")
        try:
            return await trio.to_thread.run_sync(self._fetch, tuple(ranges), want_leaves)
        except OSError as error:
            raise StoreError(f"cannot read the snapshot: {error}") from error

    def _fetch(self, ranges: tuple[PageRange, ...], want_leaves: bool) -> Fetched:
        found = [run for pages in ranges for run in self._runs(pages)]
        if self._digests_fd < 0:
            return Fetched(tuple(found), page_digests={run.pages.start: _digests(run) for run in found})
        leaves = {page // LEAF_PAGES for pages in ranges for page in range(pages.start, pages.end)}
        return Fetched(tuple(found), leaves={leaf: self._leaf(leaf) for leaf in sorted(leaves)} if want_leaves else {})

    def _runs(self, pages: PageRange) -> Iterator[PageRun]:
        data = memoryview(pread_all(self._ram_fd, pages.length_bytes, pages.offset_bytes))
        flags = [is_zero(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE)]
        start = 0
        for index in range(1, pages.count + 1):
            if index == pages.count or flags[index] != flags[start]:
                part = bytes(data[start * PAGE_SIZE : index * PAGE_SIZE]) if not flags[start] else None
                yield PageRun(PageRange(pages.start + start, index - start), part)
                start = index

    def _leaf(self, leaf: int) -> bytes:
        length = self._shape.leaf_pages(leaf) * DIGEST_BYTES
        return pread_all(self._digests_fd, length, leaf * LEAF_PAGES * DIGEST_BYTES)

    def close(self) -> None:
        for fd in (self._ram_fd, self._digests_fd):
            if fd >= 0:
                os.close(fd)
        self._ram_fd = self._digests_fd = -1


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotError(f"cannot open {path}: {error.strerror}") from error


def _digests(run: PageRun) -> bytes:
    data = memoryview(run.data if run.data is not None else bytes(run.pages.length_bytes))
    return b"".join(page_digest(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE))
