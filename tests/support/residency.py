"""What of a file the kernel has in memory."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from lazymem.pages import PAGE_SIZE


def cached_pages(path: Path) -> int:
    """mincore(2)."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        pages = len(view) // PAGE_SIZE
        seen = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(view)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view)), seen) == 0
        finally:
            del first
        return sum(state & 1 for state in seen)
