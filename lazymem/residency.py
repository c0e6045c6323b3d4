"""Which pages of a file this host has in memory: to read those costs no disk, and fetches nothing that lies elsewhere.

By mincore(2). The kernel tells the truth only to who may write to the file, and calls everything resident to others.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

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
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

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
    states = ctypes.create_string_buffer(pages.count)
    with _mapped(fd, pages) as (address, length):
        if _libc.mincore(address, length, states):
            raise _error()
    return states.raw.translate(_IN_MEMORY)


def read_alone(fd: int, pages: PageRange) -> bytes:
    """The bytes of pages of the open file, less where it ends, and nothing is read ahead of them.

    read(2) of a page in memory lets the kernel go on reading ahead from where it once ended, POSIX_FADV_RANDOM or not:
    who reads again and again what is resident would so have all of a mount fetched. A map with MADV_RANDOM does not,
    and /proc/self/mem fails where a look at the map would be a SIGBUS.

    Raises:
        OSError: the file cannot be mapped.
    """
    with _mapped(fd, pages) as (address, length), open("/proc/self/mem", "rb", buffering=0) as memory:
        if _libc.madvise(address, length, mmap.MADV_RANDOM):
            raise _error()
        try:
            return os.pread(memory.fileno(), length, address)
        except OSError as error:
            if error.errno == errno.EIO:  # not even the first one is there
                return b""
            raise


@contextlib.contextmanager
def _mapped(fd: int, pages: PageRange) -> Iterator[tuple[int, int]]:
    """Address and length."""
    length = pages.count * PAGE_SIZE
    address = _libc.mmap64(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, pages.start * PAGE_SIZE)
    if address == _FAILED:
        raise _error()
    try:
        yield address, length
    finally:
        _libc.munmap(address, length)


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
