"""System calls that Python's library lacks: mount(2), umount2(2), prctl(2), sync_file_range(2), open_tree(2),
mlock(2)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)


def system_call(name: str, *arguments: bytes | int | ctypes.c_ulong | ctypes.c_int64) -> None:
    """Call libc's `name`, which returns 0 or sets errno.

    Raises:
        OSError: with the call's errno.
    """
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def descriptor_call(number: int, *arguments: bytes | int) -> int:
    """Make system call `number`, which libc may not know by name and which returns a descriptor.

    Raises:
        OSError: with the call's errno.
    """
    descriptor = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return descriptor


def lock_in_memory(buffer: mmap.mmap) -> None:
    """Keep all of `buffer` from being swapped out, where that is permitted (RLIMIT_MEMLOCK)."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    with contextlib.suppress(OSError):
        system_call("mlock", ctypes.c_ulong(start), ctypes.c_ulong(len(buffer)))
