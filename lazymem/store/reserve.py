"""Room on the disk that is taken before a guest writes, so that nobody else fills it (`--reserve`). Blocking.

Nobody knows which pages a guest will write, and blocks of a disk cannot be moved from one place of a file to another.
So what is reserved is a file beside the written pages that is cut shorter when these find no room. Between the cut and
the write somebody else may take what was freed; a reserve for all of the RAM is therefore taken in the pages' own file.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from lazymem.errors import StoreError
from lazymem.store import folders
from lazymem.store.fallocate import allocate, punch

RESERVE_NAME = "reserve"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """The open file `fd`, taken over: all of its bytes are room that can be given."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.bytes_left = os.fstat(fd).st_size

    def give(self, most_bytes: int) -> int:
        """Free room of at most so many bytes; how many it was.

        Raises:
            OSError: the disk refused.
        """
        given = min(most_bytes, self.bytes_left)
        if given:
            os.ftruncate(self._fd, self.bytes_left - given)
            self.bytes_left -= given
        return given

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def modest(ram_fd: int, wanted_bytes: int) -> int:
    """`wanted_bytes` for `take`, or less: as much as it takes it leaves free on the disk. 0: there is next to nothing.

    Raises:
        StoreError: the disk refused.
    """
    try:
        found, there = os.fstatvfs(ram_fd), os.fstat(ram_fd).st_blocks * 512
    except OSError as error:
        raise _cannot_look(error) from error
    half = found.f_bavail * found.f_frsize // 2
    if not found.f_blocks or there + half >= wanted_bytes:  # where all is 0, there is no limit
        return wanted_bytes
    return there + half >> 20 << 20


def take(folder: Path, ram_fd: int, ram_bytes: int, wanted_bytes: int) -> Reserve:
    """Have room for `wanted_bytes` of written pages, what is in their file `ram_fd` already counted in.

    Raises:
        StoreError: there is not so much room, or the file system cannot reserve any. None is taken then.
    """
    try:
        there = os.fstat(ram_fd).st_blocks * 512
    except OSError as error:
        raise _cannot_look(error) from error
    fd = _open(folder)
    whole = wanted_bytes >= ram_bytes
    missing = (ram_bytes if whole else wanted_bytes) - there
    try:
        os.ftruncate(fd, 0)
        if missing > 0:
            _check_free(fd, missing)
            allocate(ram_fd if whole else fd, ram_bytes if whole else missing)
        return Reserve(fd)
    except OSError as error:
        _give_back(fd)
        if whole and not there:
            with contextlib.suppress(OSError):
                punch(ram_fd, 0, ram_bytes)
        why = "there is not so much room" if error.errno in _NO_ROOM else "its file system cannot do it"
        raise StoreError(
            f"cannot reserve {wanted_bytes} bytes in {folder} for what the guest writes: {why} ({error.strerror}); "
            "make room, or say --reserve with less, or 0"
        ) from error


def go_on_with(folder: Path) -> Reserve:
    """What is left of the reserve of a run that goes on. A full disk is no time to take more.

    Raises:
        StoreError: the disk refused.
    """
    fd = _open(folder)
    try:
        return Reserve(fd)
    except OSError as error:
        os.close(fd)
        raise _cannot_look(error) from error


def _cannot_look(error: OSError) -> StoreError:
    return StoreError(f"cannot look at the disk for what the guest writes: {error.strerror}")


def _open(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(folder / RESERVE_NAME, flags, folders.FILE_MODE)
        os.fchmod(fd, folders.FILE_MODE)  # whatever the umask took away
        return fd
    except OSError as error:
        raise StoreError(f"cannot open {folder / RESERVE_NAME}: {error.strerror}") from error


def _check_free(fd: int, wanted_bytes: int) -> None:
    """A file system that cannot allocate all of it may allocate a part."""
    found = os.fstatvfs(fd)
    if found.f_blocks and found.f_bavail * found.f_frsize < wanted_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _give_back(fd: int) -> None:
    try:
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)
