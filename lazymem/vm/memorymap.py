"""Which RAM block answers at which physical address. Pure but for the blocks' own reads and writes.

As in QEMU's `pc`: pc.ram from 0 up, with a hole for the VGA window and the BIOS below 1 MiB, and split at 3 GiB so that
32-bit addresses are left for devices; the rest goes on at 4 GiB. Offsets in pc.ram count on across the hole at 3 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from msgspec import Struct

MIB = 1 << 20
VGA_WINDOW, VGA_WINDOW_BYTES = 0xA0000, 0x20000
BIOS_BYTES = 128 << 10
BIOS_ALIAS = MIB - BIOS_BYTES
BIOS_TOP = (1 << 32) - BIOS_BYTES
LOW_RAM_LIMIT = 3 << 30
HIGH_RAM = 1 << 32
MIN_RAM_BYTES = 2 * MIB
"""Below it there is no room for a kernel at 1 MiB."""
MAX_RAM_BYTES = (1 << 40) - (HIGH_RAM - LOW_RAM_LIMIT)
"""What a CPU with 40 physical address bits reaches, as QEMU's pc has them by default. Mapping it costs the engine time
for each page, half a minute for this much."""


class Memory(Protocol):
    """A RAM block (vm/ram.py), as far as the machine needs it. `address`: host pointer; `size` in bytes."""

    @property
    def size(self) -> int: ...

    @property
    def address(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...


class Region(Struct, frozen=True):
    """`size` bytes of `block` from `offset` on appear at physical `address`."""

    address: int
    size: int
    block: Memory
    offset: int

    @property
    def host_pointer(self) -> int:
        return self.block.address + self.offset


class MemoryMap:
    """The physical address space's memory. `read` and `write` may wait for a page of a mount."""

    def __init__(self, blocks: Mapping[str, Memory]) -> None:
        self.regions = tuple(_regions(blocks))

    def read(self, address: int, length: int) -> bytes:
        """Physical memory.

        Raises:
            LookupError: part of it is not memory.
        """
        return b"".join(region.block.read(offset, size) for region, offset, size in self._pieces(address, length))

    def write(self, address: int, data: bytes) -> None:
        """Raises as `read` does, and then has written nothing."""
        at = 0
        for region, offset, size in list(self._pieces(address, len(data))):
            region.block.write(offset, data[at : at + size])
            at += size

    def _pieces(self, address: int, length: int) -> Iterator[tuple[Region, int, int]]:
        while length > 0:
            region = next((r for r in self.regions if r.address <= address < r.address + r.size), None)
            if region is None:
                raise LookupError(f"there is no memory at physical address {address:#x}")
            inside = address - region.address
            size = min(length, region.size - inside)
            yield region, region.offset + inside, size
            address += size
            length -= size


def _regions(blocks: Mapping[str, Memory]) -> Iterator[Region]:
    ram, bios, vram = blocks["pc.ram"], blocks["pc.bios"], blocks["vga.vram"]
    low = min(ram.size, LOW_RAM_LIMIT)
    yield Region(0, VGA_WINDOW, ram, 0)
    yield Region(VGA_WINDOW, VGA_WINDOW_BYTES, vram, 0)
    above_window = VGA_WINDOW + VGA_WINDOW_BYTES
    yield Region(above_window, BIOS_ALIAS - above_window, ram, above_window)
    yield Region(BIOS_ALIAS, BIOS_BYTES, bios, 0)
    yield Region(MIB, low - MIB, ram, MIB)
    yield Region(BIOS_TOP, BIOS_BYTES, bios, 0)
    if ram.size > low:
        yield Region(HIGH_RAM, ram.size - low, ram, low)
