"""A RAM-sized sparse file: reads that do not block where possible, everything else in threads.

Buffered, so that a page that waits for its first READ is in memory, once; what the guest's kernel has got is named by
`let_go`, so that it is not there twice. Callers write whole pages, but for parts of pages that are in the file already.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter

import trio

from lazymem.errors import StoreError
from lazymem.nowait import nowait_flags
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.fallocate import punch
from lazymem.store.secondcopy import SecondCopy
from lazymem.store.threads import in_thread, in_thread_at_last

READ_THREADS = 8
"""Reads that wait for the disk at a time. A disk gains little beyond; reads have their own threads, apart from writes,
so that a fault never waits behind a writer that the kernel holds back for its dirt."""

WRITE_THREADS = 4

BLOCK_PAGES = 32
BLOCK_BYTES = BLOCK_PAGES * PAGE_SIZE
"""The kernel caches what one call writes in pieces as large as it can, and lets go of whole pieces only: so none is
larger than what a READ takes. (Also at most 32 buffers in a call, of the kernel's 1,024.)"""

LEFT_FREE_BYTES = 64 << 20
LEFT_FREE_SHARE = 20
"""Fetched pages leave 64 MiB, or a twentieth of a small disk, to those who cannot do without: else a mount that fills
its cache, in another process maybe, takes at once what was given up for a guest's writes."""

_NO_NOWAIT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class PageFile:
    """The open file `fd`, taken over. `name` is for errors."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._nowait = True
        self._nowait_flags = nowait_flags(fd)
        self._readers = trio.CapacityLimiter(READ_THREADS)
        self._writers = trio.CapacityLimiter(WRITE_THREADS)
        self._second_copy = SecondCopy(fd)
        self._buffer = memoryview(bytearray(BLOCK_BYTES))  # for reads at hand, of which there is one at a time

    @property
    def busy(self) -> int:
        """Threads at work on the file."""
        return self._readers.borrowed_tokens + self._writers.borrowed_tokens

    def maybe_read_nowait(self, offset: int, length: int) -> bytes | None:
        """`length` bytes if the kernel has them at hand, else None. Never waits for a disk."""
        if not self._nowait:
            return None
        if len(self._buffer) < length:
            self._buffer = memoryview(bytearray(length))
        view = self._buffer[:length]
        try:
            done = os.preadv(self._fd, [view], offset, self._nowait_flags)
        except BlockingIOError:
            return None
        except OSError as error:
            # A file system without NOWAIT says so once; any other error shows itself again in `read`.
            self._nowait = error.errno not in _NO_NOWAIT
            return None
        return bytes(view) if done == length else None

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            StoreError: the disk refused, or the file is shorter.
        """
        try:
            return await in_thread(self._readers, pread_all, self._fd, length, offset)
        except OSError as error:
            raise StoreError(f"cannot read {self._name}: {error}") from error

    async def write(self, offset: int, data: bytes | memoryview, then: Callable[[], None] | None = None) -> None:
        """All of `data`, in the kernel's hands on return: it outlives this process. Runs to its end if cancelled.

        `then`: what follows in the same thread, once the bytes are there.

        Raises:
            StoreError: the disk refused; part of `data` may be there.
        """

        def work() -> None:
            pwrite_all(self._fd, data, offset)
            if then is not None:
                then()

        try:
            await in_thread(self._writers, work)
        except OSError as error:
            raise StoreError(f"cannot write {self._name}: {error}") from error

    async def write_many(self, pieces: list[tuple[int, bytes | memoryview]]) -> None:
        """Several (offset, data), in one thread, of what can be had again: some of the disk stays free for what cannot.
        Otherwise as `write`."""

        def work() -> None:
            leave_room(self._fd)
            _pwrite_pieces(self._fd, pieces)

        try:
            await in_thread(self._writers, work)
        except OSError as error:
            raise StoreError(f"cannot write {self._name}: {error}") from error

    async def punch(self, ranges: Iterable[PageRange]) -> None:
        """Give the room of these pages back to the disk; they read as zeros.

        Raises:
            StoreError: the file system cannot do that, or refused.
        """

        def work() -> None:
            for pages in ranges:
                punch(self._fd, pages.offset_bytes, pages.length_bytes)

        try:
            await in_thread(self._writers, work)
        except OSError as error:
            raise StoreError(f"cannot make holes in {self._name}: {error}") from error

    def fileno(self) -> int:
        return self._fd

    def let_go(self, pages: PageRange) -> None:
        """The guest's kernel has these pages: it need not cache them of this file too. Returns at once."""
        self._second_copy.let_go(pages.start, pages.end)

    async def sync(self) -> None:
        """Bytes reach the disk; afterwards the kernel's second copy of them goes."""
        try:
            await in_thread_at_last(self._writers, _fsync_and_drop, self._fd)
        except OSError as error:
            raise StoreError(f"cannot sync {self._name}: {error}") from error

    def close(self) -> None:
        self._second_copy.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def pread_all(fd: int, length: int, offset: int) -> bytes:
    """Blocking: exactly `length` bytes, or OSError where the file ends before."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"file ends at byte {offset + len(data)}")
        data += more
    return data


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Blocking: all of `data`."""
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def leave_room(fd: int, times: int = 1) -> None:
    """Blocking. OSError (ENOSPC) where what can be had again would take the last of the disk below the open file;
    `times`: so many times as much has to be left."""
    found = os.fstatvfs(fd)
    left = min(LEFT_FREE_BYTES, found.f_blocks * found.f_frsize // LEFT_FREE_SHARE)
    if found.f_bavail * found.f_frsize < left * times:  # where all is 0, there is no limit
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (but for what guests write)")


def _pwrite_pieces(fd: int, pieces: list[tuple[int, bytes | memoryview]]) -> None:
    """In ascending order, and one call for all that follow one after the other in a block."""
    start = end = 0
    buffers: list[bytes | memoryview] = []
    for offset, data in _cut(sorted(pieces, key=itemgetter(0))):
        if buffers and (offset != end or offset % BLOCK_BYTES == 0):
            _pwritev_all(fd, buffers, start)
            buffers.clear()
        if not buffers:
            start = offset
        buffers.append(data)
        end = offset + len(data)
    if buffers:
        _pwritev_all(fd, buffers, start)


def _cut(pieces: Iterable[tuple[int, bytes | memoryview]]) -> Iterator[tuple[int, bytes | memoryview]]:
    """The same where blocks begin."""
    for offset, data in pieces:
        room = BLOCK_BYTES - offset % BLOCK_BYTES
        if len(data) <= room:
            yield offset, data
            continue
        view = memoryview(data)
        yield offset, view[:room]
        for at in range(room, len(view), BLOCK_BYTES):
            yield offset + at, view[at : at + BLOCK_BYTES]


def _pwritev_all(fd: int, buffers: list[bytes | memoryview], offset: int) -> None:
    done = os.pwritev(fd, buffers, offset)
    if done < sum(map(len, buffers)):
        pwrite_all(fd, memoryview(b"".join(buffers))[done:], offset + done)


def _fsync_and_drop(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
