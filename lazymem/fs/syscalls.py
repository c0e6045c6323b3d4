"""System calls that Python's library lacks: mount(2), umount2(2), prctl(2), sync_file_range(2), open_tree(2),
mlock(2), mmap(2)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)


def system_call(name: str, *arguments: bytes | int | ctypes.c_ulong | ctypes.c_int64 | ctypes.c_void_p) -> None:
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


_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_shared(descriptor: int, size: int) -> int:
    """The address of its first `size` bytes, to be read. (Python's own mmap keeps a descriptor as long as its map.)

    Raises:
        OSError: with mmap's errno.
    """
    address: int = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address


def unmap(address: int, size: int) -> None:
    """What `map_shared` gave."""
    system_call("munmap", ctypes.c_void_p(address), ctypes.c_ulong(size))


def lock_in_memory(buffer: mmap.mmap) -> None:
    """Keep all of `buffer` from being swapped out, where that is permitted (RLIMIT_MEMLOCK)."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    with contextlib.suppress(OSError):
        system_call("mlock", ctypes.c_ulong(start), ctypes.c_ulong(len(buffer)))
