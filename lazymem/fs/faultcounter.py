"""The kernel's word on a thread's page faults: perf_event_open(2), PERF_COUNT_SW_PAGE_FAULTS.

Each fault is counted, with its address, before it is handled. The records overwrite each other from the back of a page
of memory, which nobody has to empty and nobody is woken by; the newest is two words to read. A map keeps its counter
alive, and the kernel gives it to no child, so no descriptor is held.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

from lazymem.fs.syscalls import descriptor_call, map_shared, unmap
from lazymem.pages import PAGE_SIZE

_NUMBERS = {"x86_64": 298, "aarch64": 241}
"""Of the system call; libc has no name for it."""

_SOFTWARE, _PAGE_FAULTS = 1, 2
_SAMPLE_ADDRESS = 1 << 3
_EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR, _WATERMARK, _WRITE_BACKWARD = 1 << 5, 1 << 6, 1 << 14, 1 << 27
_ATTRIBUTES_BYTES = 128
_NEVER_BYTES = 1 << 30
_ATTRIBUTES = struct.pack(
    "=IIQQQQQII72x",
    _SOFTWARE,
    _ATTRIBUTES_BYTES,
    _PAGE_FAULTS,
    1,  # each one is recorded,
    _SAMPLE_ADDRESS,
    0,
    _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR | _WATERMARK | _WRITE_BACKWARD,
    _NEVER_BYTES,  # and after so many bytes of records somebody would be woken
    0,
)
_CLOSE_ON_EXEC = 1 << 3

_MAP_BYTES = 2 * PAGE_SIZE
"""A page that says where the records are, and one of records."""

_PAGE_WORDS = PAGE_SIZE // 8
_HEAD_AT = 1024 // 8
"""data_head: where the newest record begins, modulo the size of what has them. It only falls, from 0."""

_SAMPLE, _SAMPLE_MASK = 9 | 16 << 48, 0xFFFF_0000_FFFF_FFFF
"""A record's first word without the CPU's mode: its type, and its size of 16 bytes. The second one is the address."""


class FaultCounter:
    """Of one thread, from now until `close`; 0: of the one that calls."""

    def __init__(self, thread: int) -> None:
        """The first one of a machine takes the kernel some 20 ms.

        Raises:
            OSError: not permitted, or unknown here; there is no such thread; none is left of what it needs.
        """
        number = _NUMBERS.get(platform.machine())
        if number is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError(f"nobody knows how to count page faults on {platform.machine()}")
        descriptor = descriptor_call(number, _ATTRIBUTES, thread, -1, -1, _CLOSE_ON_EXEC)
        try:
            self._address = map_shared(descriptor, _MAP_BYTES)
        finally:
            os.close(descriptor)
        self._words = (ctypes.c_uint64 * (2 * _PAGE_WORDS)).from_address(self._address)

    def newest(self) -> tuple[int, int]:
        """A number for the newest fault, another one for each, and its address; 0 and 0 before the first."""
        words = self._words
        head: int = words[_HEAD_AT]
        at = _PAGE_WORDS + head % PAGE_SIZE // 8
        if not head or words[at] & _SAMPLE_MASK != _SAMPLE:
            return 0, 0
        return head, words[at + 1]

    def close(self) -> None:
        """Nothing may be asked afterwards."""
        del self._words
        unmap(self._address, _MAP_BYTES)


def may_count() -> bool:
    """Whether the kernel lets this process count page faults."""
    try:
        FaultCounter(0).close()
    except OSError:
        return False
    return True
