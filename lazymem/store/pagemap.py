"""One byte a page in a sparse file: which pages are held, or written.

Stores are pwrite of single values, never read-modify-write of something shared, so two processes with the same map lose
nothing; and a full disk is an error, where a store into a mapped hole would be SIGBUS. Look-ups go through a shared
read-only mapping, at C speed, and see every other process's stores at once. The file outlives a killed process.

All of the file is allocated when it is opened. A memory file system would otherwise allocate a hole when it is *looked
at* through the mapping, and when it is full answer with SIGBUS, that is, with the daemon's death and the guest's.
What it holds, and what is looked at, is locked in memory (`lockedmap`): a page that was let go of would come back from
the disk, and one that the disk cannot read any more is SIGBUS, too. (So is a file that somebody cuts short.)

Caveat: `count` knows what other processes stored only up to the last `recount`.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator

from lazymem.errors import StoreError
from lazymem.pages import PageRange
from lazymem.store.lockedmap import lock_what_is_touched

UNSET = 0
SET = 1
SET_ZERO = 2
"""Held, and every byte of it is zero: nothing stands in the pages file."""

_STATES = tuple(bytes([state]) for state in (UNSET, SET, SET_ZERO))
_CHUNK_BYTES = 64 * 1024
_NOTHING = bytes(_CHUNK_BYTES)
"""A chunk without a set page: told by memcmp, twenty times as fast as counting its zeros."""


class PageMap:
    """States of `pages` pages in the open file `fd`, which has exactly that size. Takes `fd` over, also when it fails.

    Raises:
        StoreError: the disk has no room for it, or refused.
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._fd = fd
        self._pages = pages
        self._count = 0
        try:
            self.recount()  # before it is allocated: a new map of a huge RAM is one hole still, and costs nothing
            os.posix_fallocate(fd, 0, pages)
            self._map = mmap.mmap(fd, pages, mmap.MAP_SHARED, mmap.PROT_READ)
            if lock_what_is_touched(self._map):
                self._touch_data()
        except StoreError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            raise StoreError(f"no room for a page map of {pages} bytes: {error.strerror}") from error

    @property
    def pages(self) -> int:
        return self._pages

    def fileno(self) -> int:
        """The open file, for another process that looks at it."""
        return self._fd

    @property
    def count(self) -> int:
        """Pages that are not `UNSET`."""
        return self._count

    def states(self, pages: PageRange) -> bytes:
        """One byte a page of `pages`."""
        return self._map[pages.start : pages.end]

    def states_at(self, pages: range) -> bytes:
        """One byte for each page number of `pages`."""
        return self._map[pages.start : pages.stop : pages.step]

    def all_unset(self, pages: PageRange) -> bool:
        if pages.count == 1:
            return not self._map[pages.start]
        return not self._map[pages.start : pages.end].strip(b"\0")

    def set(self, pages: PageRange, state: int) -> None:
        """Give all of `pages` one state. Only after their bytes are where the state says.

        Raises:
            StoreError: the disk refused; the map is as before, or partly changed.
        """
        self._store(pages.start, _STATES[state] * pages.count)

    def set_many(self, marks: Iterable[tuple[PageRange, int]]) -> None:
        """As `set` for each, with one store for what follows one after the other."""
        states: list[bytes] = []
        start = end = 0
        for pages, state in marks:
            if pages.start != end and states:
                self._store(start, b"".join(states))
                states.clear()
            if not states:
                start = pages.start
            states.append(_STATES[state] * pages.count)
            end = pages.end
        if states:
            self._store(start, b"".join(states))

    def set_uncounted(self, pages: PageRange, state: int) -> None:
        """As `set`, for any thread: `count` is as before until `count_in`."""
        self._pwrite(pages.start, _STATES[state] * pages.count)

    def count_in(self, pages: int) -> None:
        """So many pages were `UNSET` before a `set_uncounted`."""
        self._count += pages

    def _store(self, start: int, states: bytes) -> None:
        unset_before = self._map[start : start + len(states)].count(UNSET)
        self._pwrite(start, states)
        self._count += unset_before - states.count(UNSET)

    def _pwrite(self, start: int, states: bytes) -> None:
        end = start + len(states)
        if end > self._pages:
            raise ValueError(f"pages up to {end} in a map of {self._pages}")
        try:
            done = os.pwrite(self._fd, states, start)
        except OSError as error:
            raise StoreError(f"cannot note pages in the page map: {error}") from error
        if done != len(states):
            raise StoreError("cannot note pages in the page map: short write")

    def unset_runs(self, pages: PageRange) -> Iterator[PageRange]:
        """The runs within `pages` that are `UNSET`, in order; reads the map as it goes."""
        start = self.first_unset(pages.start, pages.end)
        while start < pages.end:
            end = self.first_set(start, pages.end)
            if end > start:  # or another process has set it just now
                yield PageRange(start, end - start)
            start = self.first_unset(end, pages.end)

    def first_unset(self, start: int, end: int) -> int:
        """First page in ``start ... end - 1`` that is `UNSET`, or `end`."""
        found = self._map.find(b"\0", start, end)
        return end if found < 0 else found

    def first_set(self, start: int, end: int) -> int:
        """First page in ``start ... end - 1`` that is not `UNSET`, or `end`. A long hole costs no copy of it all."""
        for at in range(start, end, _CHUNK_BYTES):
            chunk = self._map[at : min(end, at + _CHUNK_BYTES)]
            rest = chunk.lstrip(b"\0")
            if rest:
                return at + len(chunk) - len(rest)
        return end

    def learn_count(self, count: int) -> None:
        """Another process counted so many: true if pages were only added meanwhile, as in a cache that fills."""
        self._count = min(self._pages, max(self._count, count))

    def recount(self) -> int:
        """Count again, including what other processes stored; holes of the file cost nothing. Also returns `count`.

        Raises:
            StoreError: the disk does not give the map back; `count` is as before.
        """
        try:
            self._count = sum(len(chunk) - chunk.count(UNSET) for chunk in self._data_chunks() if chunk != _NOTHING)
        except OSError as error:
            raise StoreError(f"cannot read the page map: {error.strerror}") from error
        return self._count

    def _touch_data(self) -> None:
        """What was read a moment ago, so that no disk has a say in it."""
        for start, end in self._data_ranges():
            for at in range(start, end, mmap.PAGESIZE):
                self._map[at]

    def _data_chunks(self) -> Iterator[bytes]:
        for start, end in self._data_ranges():
            for offset in range(start, end, _CHUNK_BYTES):
                yield os.pread(self._fd, min(_CHUNK_BYTES, end - offset), offset)

    def _data_ranges(self) -> Iterator[tuple[int, int]]:
        """Where the file is no hole: start and end."""
        at = 0
        while at < self._pages:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole up to the end
                    return
                raise StoreError(f"cannot read the page map: {error}") from error
            at = min(os.lseek(self._fd, start, os.SEEK_HOLE), self._pages)
            yield start, at

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._map.close()
            os.close(fd)
