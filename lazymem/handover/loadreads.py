"""Which pages of a guest's RAM an emulator reads while it loads the guest's device state. Blocking.

QEMU's kvmvapic reads its option ROM, some 9 KiB, which the guest's firmware has copied to where it had room: behind the
VGA BIOS and the ROMs of network devices. What is looked for is the signature in its first block.
"""

from __future__ import annotations

import os
from pathlib import Path

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.residency import may_ask, read_alone, resident, runs_of_ones

_SIGNATURE = b"kvm aPiC"
_HEADER = b"\x55\xaa"
_BLOCK_BYTES = 512
"""An option ROM begins on a boundary of these, and says in its third byte how many it has."""

_ROMS = PageRange(0xC0, 0x30)
"""Where a PC's firmware puts option ROMs."""


def load_reads(ram: Path) -> list[int]:
    """Their page numbers, as far as they are known and in this host's memory: nothing is fetched for it."""
    if not may_ask(ram):
        return []
    try:
        descriptor = os.open(ram, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return _found(descriptor)
    except OSError:
        return []
    finally:
        os.close(descriptor)


def _found(descriptor: int) -> list[int]:
    if os.fstat(descriptor).st_size < _ROMS.end * PAGE_SIZE:
        return []
    for run in runs_of_ones(_ROMS.start, resident(descriptor, _ROMS)):
        data = read_alone(descriptor, run)
        at = data.find(_SIGNATURE)
        if at >= 0:
            begin = at // _BLOCK_BYTES * _BLOCK_BYTES
            end = begin + data[begin + len(_HEADER)] * _BLOCK_BYTES
            if data[begin:].startswith(_HEADER) and end > at:
                return [run.start + page for page in range(begin // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1)]
    return []
