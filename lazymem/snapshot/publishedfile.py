"""Reading a published file: without waiting where the host has the page in memory, and without reading holes.

Knows bytes only; whether they are the right ones is `vouching`'s subject.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from lazymem.errors import VerificationError
from lazymem.nowait import nowait_flags
from lazymem.pages import PAGE_SHIFT, PageRange
from lazymem.residency import resident

_WOULD_WAIT = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS)


class PublishedFile:
    """A file that is open for reading. Any thread may call any method."""

    def __init__(self, fd: int) -> None:
        """Takes the descriptor over."""
        self._fd = fd
        self._nowait_flags = nowait_flags(fd)

    def signature(self) -> tuple[int, int, int, int, int]:
        """What `stat` says of the file; a write through any path moves it (a mapped one sooner or later)."""
        found = os.fstat(self._fd)  # costs 2 us; the hot path asks once a read
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def read_nowait(self, offset: int, length: int) -> bytearray | None:
        """So many bytes if no disk has to be waited for, else None."""
        buffer = bytearray(length)
        return buffer if self.read_into_nowait(buffer, offset) else None

    def read_into_nowait(self, buffer: bytearray | memoryview, offset: int) -> bool:
        """Fill `buffer` if no disk has to be waited for; whether it is full."""
        try:
            return os.preadv(self._fd, (buffer,), offset, self._nowait_flags) == len(buffer)
        except OSError as error:
            if error.errno in _WOULD_WAIT:
                return False
            raise

    def read(self, offset: int, length: int) -> bytearray:
        """So many bytes; may wait for a disk.

        Raises:
            VerificationError: the file is shorter than when it was published.
            OSError: the disk failed.
        """
        buffer = bytearray(length)
        view = memoryview(buffer)
        done = 0
        while done < length:
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if not count:
                raise VerificationError(f"a file ends at byte {offset + done}: it was cut while it is served")
            done += count
        return buffer

    def segments(self, pages: PageRange) -> Iterator[tuple[PageRange, bool]]:
        """`pages` cut into pieces that are (True) data, or (False) lie in a hole whole. May wait for a disk."""
        start = pages.start
        while start < pages.end:
            offset = start << PAGE_SHIFT
            data = self._seek(offset, os.SEEK_DATA)
            first = pages.end if data is None else min(pages.end, data >> PAGE_SHIFT)
            if data is None or first > start:
                yield PageRange(start, first - start), False
                start = first
                continue
            # From `data` on, since a file system's blocks may be smaller than a page.
            hole = self._seek(data, os.SEEK_HOLE)
            end = pages.end if hole is None else min(pages.end, max(start + 1, -(-hole >> PAGE_SHIFT)))
            yield PageRange(start, end - start), True
            start = end

    def resident(self, pages: PageRange) -> bytes:
        """One byte a page, 1: it is in memory.

        Raises:
            OSError: nobody can tell.
        """
        return resident(self._fd, pages)

    def _seek(self, offset: int, whence: int) -> int | None:
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole behind
                return None
            raise

    def close(self) -> None:
        os.close(self._fd)
