"""What a boot loader puts into guest RAM below 640 KiB: memory map, identity page tables, GDT.

No kernel is loaded there:

    0x01000  GDT
    0x02000  boot parameters ("zero page")
    0x03000  command line
    0x08000  top of the initial stack
    0x10000  page tables
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from msgspec import Struct

Write = Callable[[int, bytes], None]
"""Writes bytes at a physical address."""

GDT_ADDRESS = 0x1000
BOOT_PARAMS_ADDRESS = 0x2000
COMMAND_LINE_ADDRESS = 0x3000
STACK_TOP = 0x8000
PAGE_TABLES_ADDRESS = 0x10000

LOW_RAM_END = 0x9FC00
"""Where the extended BIOS data area of a PC begins."""

KERNEL_AREA = 0x100000
"""No kernel is loaded below 1 MiB: text memory, firmware and the tables named here are there."""

GIB = 1 << 30
_MAX_MAPPED_GIB = 128
"""The tables for this many fit below 640 KiB. A kernel with more RAM maps the rest itself."""

_PRESENT_WRITABLE, _LARGE = 0x03, 0x80

_GDT = struct.pack(
    "<4Q",
    0,
    0,
    0x00AF_9B00_0000_FFFF,  # 0x10: code, 64-bit, ring 0
    0x00CF_9300_0000_FFFF,  # 0x18: data, flat, ring 0
)

E820_RAM, E820_RESERVED = 1, 2


class RamRegion(Struct, frozen=True):
    """Guest-physical RAM in one piece; both in bytes."""

    address: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


def write_gdt(write: Write) -> tuple[int, int]:
    """Descriptors for selectors 0x10 and 0x18; returns GDTR's base and limit."""
    write(GDT_ADDRESS, _GDT)
    return GDT_ADDRESS, len(_GDT) - 1


def write_identity_map(write: Write, regions: Sequence[RamRegion]) -> int:
    """Map each address to itself in 2 MiB pages, up to 4 GiB or the end of RAM; returns CR3's value."""
    end = max(4 * GIB, *(region.end for region in regions))
    gib_count = min(-(-end // GIB), _MAX_MAPPED_GIB)
    pointers = PAGE_TABLES_ADDRESS + 0x1000
    directories = pointers + 0x1000
    write(PAGE_TABLES_ADDRESS, _entries([pointers | _PRESENT_WRITABLE]))
    write(pointers, _entries([directories + 0x1000 * gib | _PRESENT_WRITABLE for gib in range(gib_count)]))
    for gib in range(gib_count):
        pages = range(gib * GIB, (gib + 1) * GIB, 2 << 20)
        write(directories + 0x1000 * gib, _entries([page | _PRESENT_WRITABLE | _LARGE for page in pages]))
    return PAGE_TABLES_ADDRESS


def e820_map(regions: Sequence[RamRegion]) -> list[tuple[int, int, int]]:
    """(address, size, type) as a PC's firmware tells it: RAM without the hole below 1 MiB, the firmware's own areas."""
    entries = []
    for region in regions:
        if region.address >= KERNEL_AREA:
            entries.append((region.address, region.size, E820_RAM))
            continue
        if region.address < LOW_RAM_END:
            entries.append((region.address, min(region.end, LOW_RAM_END) - region.address, E820_RAM))
        if region.end > KERNEL_AREA:
            entries.append((KERNEL_AREA, region.end - KERNEL_AREA, E820_RAM))
    entries.append((LOW_RAM_END, KERNEL_AREA - LOW_RAM_END, E820_RESERVED))
    entries.append((0xFFFE_0000, 0x2_0000, E820_RESERVED))
    return sorted(entries)


def _entries(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values).ljust(0x1000, b"\0")
