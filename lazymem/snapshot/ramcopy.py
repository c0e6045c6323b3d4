"""Copies of a RAM file while its guest stands still: a reflink where the file system has them, else only its data.

This runs in a guest's pause, so nothing here looks at the bytes that the kernel can move by itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator

from msgspec import Struct

Advance = Callable[[int], None]
"""Called with the bytes that were dealt with since the last call."""

_FICLONE = 0x40049409
"""ioctl number of FICLONE (linux/fs.h): the target shares the source's blocks until one of them is written."""

_CHUNK_BYTES = 8 << 20
"""Between two chunks an interrupt gets through; large enough that the calls cost nothing."""

_ZERO_CHECK_BYTES = 64 << 10
"""Read copies leave holes where so many bytes are zero: about what one block of a sparse file is worth."""

_ZEROS = bytes(_ZERO_CHECK_BYTES)

_NO_REFLINK = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS})
_NO_RANGE_COPY = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Copied(Struct, frozen=True):
    """How a copy was made ("reflink" or "copy") and how many bytes had to be moved for it."""

    way: str
    moved_bytes: int


def copy_ram(source: int, target: int, size_bytes: int, advance: Advance = lambda _: None) -> Copied:
    """Makes `target` (a new, empty file) the first `size_bytes` of `source`; both are descriptors.

    `advance` gets `size_bytes` in all, holes included. Raises OSError; the target is then worth nothing.
    """
    if reflink(source, target):
        os.ftruncate(target, size_bytes)
        advance(size_bytes)
        return Copied("reflink", 0)
    os.ftruncate(target, size_bytes)
    moved = done = 0
    for start, end in data_extents(source, size_bytes):
        advance(start - done)
        moved += _copy_extent(source, target, start, end, advance)
        done = end
    advance(size_bytes - done)
    return Copied("copy", moved)


def reflink(source: int, target: int) -> bool:
    """Whether `target` now shares all blocks of `source`. False where the file systems cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def data_extents(file: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """The (start, end) offsets of the parts that are not holes, ascending; one for all where nobody knows of holes."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(file, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= size_bytes:
            return
        end = min(size_bytes, os.lseek(file, start, os.SEEK_HOLE))
        yield start, end
        position = end


def _copy_extent(source: int, target: int, start: int, end: int, advance: Advance) -> int:
    """Copies one extent; returns the bytes that were moved (less than its length where it held zeros)."""
    position = start
    while position < end:
        try:
            count = os.copy_file_range(source, target, min(_CHUNK_BYTES, end - position), position, position)
        except OSError as error:
            if error.errno not in _NO_RANGE_COPY:
                raise
            count = 0
        if count == 0:
            # Another file system, or one that cannot (some say so by 0): through our hands instead.
            return position - start + _copy_by_hand(source, target, position, end, advance)
        position += count
        advance(count)
    return end - start


def _copy_by_hand(source: int, target: int, start: int, end: int, advance: Advance) -> int:
    moved = 0
    position = start
    while position < end:
        data = os.pread(source, min(_CHUNK_BYTES, end - position), position)
        if not data:
            raise OSError(errno.EIO, f"the RAM file ended at {position} bytes while it was copied")
        for at in range(0, len(data), _ZERO_CHECK_BYTES):
            piece = data[at : at + _ZERO_CHECK_BYTES]
            if piece != _ZEROS[: len(piece)]:
                write_all(target, piece, position + at)
                moved += len(piece)
        position += len(data)
        advance(len(data))
    return moved


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite(2) until all is written; a full disk is an OSError, never a short file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view = view[count:]
        offset += count
