"""Lets the library end a slice between blocks only, where a stop from another thread is exact. Knows its memory.

The library (2.1.x) looks for a stop behind every access to memory, in the middle of an instruction too, and begins that
instruction again: `add %rax, (%rbx)` has stored its sum already, and adds a second time. With stops from another
thread one in two slices of a loop of such instructions went wrong. A flag of the library's own, which it uses for
blocks that must not be left in the middle (`no_exit_request`), leaves those checks out of what is translated while it
is set; the check at a block's start stays. No call sets it, so it is found by its neighbours; `cpu_engine` proves on a
scratch engine that it does what is said here, and refuses the library otherwise.
"""

from __future__ import annotations

import ctypes
import struct

_PAGE_SIZES = struct.pack("<IIQQ", 4096, 4095, 4096, 4096)
"""The guest's page size and mask, the host's page size twice: four fields in a row, in no other place."""

_TO_FLAGS = len(_PAGE_SIZES) + 24
"""Between them and the four flags: three ints, padding, an address."""

_FLAGS_OF_A_NEW_ENGINE = bytes((0, 0, 0, 1))
"""`hook_insert`, `first_tb`, `no_exit_request`, `init_done`."""

_WHICH_FLAG = 2
_FARTHEST_BYTES = 4096
"""Known builds have it at 2 KiB; the record is far larger than this."""


def maybe_flag_address(engine: int) -> int | None:
    """Where the flag of the engine at that address is; None in a build that is laid out otherwise.

    Only of an engine that has its memory mapped and has not run yet.
    """
    record = ctypes.string_at(engine, _FARTHEST_BYTES)
    at = record.find(_PAGE_SIZES)
    if at < 0 or record.find(_PAGE_SIZES, at + 1) >= 0:
        return None
    flags = at + _TO_FLAGS
    if record[flags : flags + 4] != _FLAGS_OF_A_NEW_ENGINE:
        return None
    return engine + flags + _WHICH_FLAG


def set_flag(address: int) -> None:
    """From here on, translated code can be left between blocks only."""
    ctypes.memset(address, 1, 1)
