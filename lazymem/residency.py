"""Which pages of a file this host has in memory: to read those costs no disk, and fetches nothing that lies elsewhere.

By mincore(2). The kernel tells the truth only to who may write to the file, and calls everything resident to others.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from lazymem.pages import PAGE_SIZE, PageRange

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap64.restype = ctypes.c_void_p
_libc.mmap64.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_FAILED = ctypes.c_void_p(-1).value

_IN_MEMORY = bytes(state & 1 for state in range(256))
"""Of mincore's byte only the lowest bit says something."""


def may_ask(path: str | os.PathLike[str]) -> bool:
    """Whether the kernel tells us of that file."""
    return os.access(path, os.W_OK)


def resident(fd: int, pages: PageRange) -> bytes:
    """One byte a page of the open file, 1: it is in memory (in the kernel's cache, to be read by anybody).

    Raises:
        OSError: the file cannot be mapped.
    """
    length = pages.count * PAGE_SIZE
    states = ctypes.create_string_buffer(pages.count)
    address = _libc.mmap64(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, pages.start * PAGE_SIZE)
    if address == _FAILED:
        raise _error()
    try:
        if _libc.mincore(address, length, states):
            raise _error()
    finally:
        _libc.munmap(address, length)
    return states.raw.translate(_IN_MEMORY)


def runs_of_ones(first_page: int, states: bytes) -> list[PageRange]:
    """The runs of pages whose byte in `states` is 1, which begins with `first_page`."""
    found: list[PageRange] = []
    start = states.find(1)
    while start >= 0:
        end = states.find(0, start)
        end = len(states) if end < 0 else end
        found.append(PageRange(first_page + start, end - start))
        start = states.find(1, end)
    return found


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
