"""fallocate(2) itself: to take room on a disk, and to give it back. Blocking.

Not `os.posix_fallocate`, which writes into every block where a file system cannot do it: seconds, on a network's.
"""

from __future__ import annotations

import ctypes
import os

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # <linux/falloc.h>

_libc = ctypes.CDLL(None, use_errno=True)


def allocate(fd: int, length: int) -> None:
    """The first `length` bytes of the file have their room on the disk; its size is at least that.

    Raises:
        OSError: no room, or (EOPNOTSUPP) the file system cannot do it.
    """
    _fallocate(fd, 0, 0, length)


def punch(fd: int, offset: int, length: int) -> None:
    """Bytes become a hole that reads as zeros, and their room is free.

    Raises:
        OSError: (EOPNOTSUPP) the file system cannot do it.
    """
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
