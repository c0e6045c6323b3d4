"""Which block answers at which address; RAM beyond the hole below 4 GiB."""

from __future__ import annotations

import itertools

import pytest

from lazymem.vm.memorymap import MIB, MemoryMap


class SparseBlock:
    """A block of any size that keeps only what was written."""

    def __init__(self, size: int) -> None:
        self.size, self.address = size, 0x7000_0000_0000
        self.bytes: dict[int, int] = {}

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes.get(offset + at, 0) for at in range(length))

    def write(self, offset: int, data: bytes) -> None:
        self.bytes.update({offset + at: byte for at, byte in enumerate(data)})


def blocks(ram_bytes: int) -> dict[str, SparseBlock]:
    return {"pc.ram": SparseBlock(ram_bytes), "pc.bios": SparseBlock(128 << 10), "vga.vram": SparseBlock(128 << 10)}


def test_small_machine() -> None:
    parts = blocks(4 * MIB)
    memory = MemoryMap(parts)
    for address, name, offset in [
        (0x9FFFF, "pc.ram", 0x9FFFF),
        (0xB8000, "vga.vram", 0x18000),
        (0xC0000, "pc.ram", 0xC0000),
        (0xE0000, "pc.bios", 0),
        (0xFFFF_FFFF, "pc.bios", 0x1FFFF),
        (0x3F_FFFF, "pc.ram", 0x3F_FFFF),
    ]:
        memory.write(address, b"\x5a")
        assert parts[name].bytes.pop(offset) == 0x5A
        assert not any(block.bytes for block in parts.values())


def test_bios_is_seen_at_both_its_places() -> None:
    memory = MemoryMap(blocks(4 * MIB))
    memory.write(0xFFFF_FFF0, b"reset vector")
    assert memory.read(0xF_FFF0, 12) == b"reset vector"


def test_a_piece_across_blocks() -> None:
    parts = blocks(4 * MIB)
    memory = MemoryMap(parts)
    memory.write(0x9FFFC, bytes(range(1, 9)))
    assert memory.read(0x9FFFC, 8) == bytes(range(1, 9))
    assert parts["pc.ram"].bytes == {0x9FFFC: 1, 0x9FFFD: 2, 0x9FFFE: 3, 0x9FFFF: 4}
    assert parts["vga.vram"].bytes == {0: 5, 1: 6, 2: 7, 3: 8}


def test_large_ram_goes_on_at_4_gib() -> None:
    parts = blocks(5 << 30)
    memory = MemoryMap(parts)
    memory.write((1 << 32) + 5, b"\x11")
    assert parts["pc.ram"].bytes == {(3 << 30) + 5: 0x11}
    regions = sorted((region.address, region.size) for region in memory.regions)
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(regions))
    ram_bytes = sum(region.size for region in memory.regions if region.block is parts["pc.ram"])
    assert ram_bytes == (5 << 30) - 2 * (128 << 10)


@pytest.mark.parametrize("address", [4 * MIB, 0xC000_0000, 1 << 32, 0xFFFD_FFFF])
def test_no_memory(address: int) -> None:
    memory = MemoryMap(blocks(4 * MIB))
    with pytest.raises(LookupError, match=hex(address)):
        memory.read(address, 1)


def test_a_write_that_does_not_fit_writes_nothing() -> None:
    parts = blocks(4 * MIB)
    with pytest.raises(LookupError):
        MemoryMap(parts).write(4 * MIB - 2, b"abcd")
    assert parts["pc.ram"].bytes == {}
