"""Loading kernels: what lands where in RAM, and one clear error for each file that is no kernel."""

from __future__ import annotations

import itertools
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazymem.errors import UsageError
from lazymem.vm.boot import load_kernel
from lazymem.vm.bootmemory import GIB, RamRegion, e820_map, write_identity_map
from lazymem.vm.startstate import StartState

MIB = 1 << 20


@dataclass
class Ram:
    """RAM that was used before: everything that nobody wrote is 0xAA."""

    regions: list[RamRegion]
    written: dict[int, bytes] = field(default_factory=dict)

    def write(self, address: int, data: bytes) -> None:
        assert any(r.address <= address and address + len(data) <= r.end for r in self.regions)
        self.written[address] = bytes(data)

    def read(self, address: int, length: int) -> bytes:
        image = bytearray(b"\xaa" * length)
        for start, data in self.written.items():
            first, last = max(start, address), min(start + len(data), address + length)
            if first < last:
                image[first - address : last - address] = data[first - start : last - start]
        return bytes(image)

    def word(self, address: int, size: int = 8) -> int:
        return int.from_bytes(self.read(address, size), "little")


def ram_of(mib: int) -> Ram:
    low = min(mib, 3072)
    regions = [RamRegion(0, low * MIB)]
    if mib > low:
        regions.append(RamRegion(4 * GIB, (mib - low) * MIB))
    return Ram(regions)


def elf(
    segments: list[tuple[int, bytes, int]],
    entry: int = 0x100000,
    *,
    bits: int = 2,
    machine: int = 62,
    kind: int = 2,
    virtual_offset: int = 0,
) -> bytes:
    """An ELF file; a segment is (physical address, bytes in the file, size in memory)."""
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        b"\x7fELF",
        bits,
        1,
        1,
        kind,
        machine,
        1,
        entry,
        64,
        0,
        0,
        64,
        56,
        len(segments),
        0,
        0,
        0,
    )
    table, body, at = b"", b"", 64 + 56 * len(segments)
    for address, data, size in segments:
        table += struct.pack("<IIQQQQQQ", 1, 7, at, address + virtual_offset, address, len(data), size, 4096)
        body += data
        at += len(data)
    return header + table + body


def linux(*, version: int = 0x20C, xloadflags: int = 1, sectors: int = 1, code: bytes = b"\x90" * 1024) -> bytes:
    image = bytearray((sectors + 1) * 512)
    image[0x1F1] = sectors
    image[0x1FE:0x202] = b"\x55\xaa\xeb\x66"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<H", image, 0x236, xloadflags)
    struct.pack_into("<I", image, 0x238, 255)
    return bytes(image) + code


def load(tmp_path: Path, image: bytes, ram: Ram, append: str = "") -> StartState:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    return load_kernel(path, append, ram.regions, ram.write)


def physical(ram: Ram, cr3: int, address: int) -> int | None:
    """Walk the page tables, as the CPU does."""
    table = cr3
    for shift in (39, 30, 21):
        entry = ram.word(table + 8 * (address >> shift & 511))
        if not entry & 1:
            return None
        if entry & 0x80:
            return entry & ~0xFFF & ~((1 << shift) - 1) | address & (1 << shift) - 1
        table = entry & 0x000F_FFFF_FFFF_F000
    return None


def test_segments_land_at_their_addresses_with_zeros_behind(tmp_path: Path) -> None:
    ram = ram_of(16)
    big = 3 * MIB + 123
    start = load(tmp_path, elf([(0x100000, b"code", 4), (0x400000, b"data", big)], entry=0x100002), ram)
    assert start.rip == 0x100002
    assert ram.read(0x100000, 6) == b"code\xaa\xaa"
    assert ram.read(0x400000, big + 1) == b"data" + bytes(big - 4) + b"\xaa"


def test_virtual_entry_is_understood(tmp_path: Path) -> None:
    offset = 0xFFFF_FFFF_8000_0000
    image = elf([(0x100000, b"code", 4096)], entry=offset + 0x100010, virtual_offset=offset)
    assert load(tmp_path, image, ram_of(8)).rip == 0x100010


@pytest.mark.parametrize(("mib", "mapped_gib"), [(2, 4), (256, 4), (6 * 1024, 7), (200 * 1024, 128)])
def test_identity_map_reaches_over_all_ram(mib: int, mapped_gib: int) -> None:
    ram = ram_of(mib)
    cr3 = write_identity_map(ram.write, ram.regions)
    for address in (0, 0x1234, 0x100000, 0xB8000, 0xFFFF_FFFF, mapped_gib * GIB - 1):
        assert physical(ram, cr3, address) == address
    assert physical(ram, cr3, mapped_gib * GIB) is None
    assert max(at + len(data) for at, data in ram.written.items()) <= 0x9FC00


def test_descriptors_fit_the_selectors(tmp_path: Path) -> None:
    ram = ram_of(8)
    start = load(tmp_path, elf([(0x100000, b"code", 4)]), ram)
    code, data = ram.word(start.gdt_base + start.code_selector), ram.word(start.gdt_base + start.data_selector)
    assert start.data_selector + 7 <= start.gdt_limit
    assert (code >> 40 & 0xFB, code >> 53 & 1) == (0x9B, 1), "present, code, 64-bit"
    assert data >> 40 & 0xFF == 0x93, "present, data, writable"


@pytest.mark.parametrize("image", [elf([(0x100000, b"code", 4)]), linux()])
def test_command_line_and_memory_map_are_found_through_rsi(tmp_path: Path, image: bytes) -> None:
    ram = ram_of(5 * 1024)
    start = load(tmp_path, image, ram, append="console=ttyS0 x=é")
    command_line = ram.read(ram.word(start.rsi + 0x228, 4), 20)
    assert command_line.split(b"\0")[0].decode() == "console=ttyS0 x=é"
    count = ram.word(start.rsi + 0x1E8, 1)
    entries = [struct.unpack("<QQI", ram.read(start.rsi + 0x2D0 + 20 * number, 20)) for number in range(count)]
    usable = [(at, size) for at, size, kind in entries if kind == 1]
    assert usable == [(0, 0x9FC00), (MIB, 3 * GIB - MIB), (4 * GIB, 2 * GIB)]
    for (at, size, _), (following, _, _) in itertools.pairwise(entries):
        assert at + size <= following, "no overlap"


def test_ram_in_pieces_below_one_mib_gives_no_empty_entries() -> None:
    entries = e820_map([RamRegion(0, 0xA0000), RamRegion(0xC0000, 0x20000), RamRegion(MIB, MIB)])
    assert all(size > 0 for _, size, _ in entries)
    assert [(at, size) for at, size, kind in entries if kind == 1] == [(0, 0x9FC00), (MIB, MIB)]


def test_linux_image_is_entered_behind_its_setup_part(tmp_path: Path) -> None:
    ram = ram_of(8)
    image = linux(sectors=3, code=bytes(range(256)) * 4)
    start = load(tmp_path, image, ram)
    assert (start.rip, ram.read(MIB, 1024)) == (MIB + 0x200, bytes(range(256)) * 4)
    assert ram.read(start.rsi + 0x202, 4) == b"HdrS", "the kernel finds its own header"
    assert ram.word(start.rsi + 0x210, 1) == 0xFF
    assert ram.word(start.rsi + 0x211, 1) & 1


def test_setup_sectors_of_zero_are_four(tmp_path: Path) -> None:
    image = bytearray(linux(sectors=4, code=b"\xcc" * 1024))
    image[0x1F1] = 0
    ram = ram_of(8)
    load(tmp_path, bytes(image), ram)
    assert ram.read(MIB, 4) == b"\xcc" * 4


GOOD = elf([(0x100000, b"code", 4)])
BAD_FILES = {
    "empty": (b"", "not a kernel"),
    "text": (b"#!/bin/sh\n" * 100, "not a kernel"),
    "elf, cut": (GOOD[:40], "header is cut"),
    "elf, 32-bit": (elf([(0x100000, b"code", 4)], bits=1), "32-bit"),
    "elf, other machine": (elf([(0x100000, b"code", 4)], machine=183), "another machine"),
    "elf, library": (elf([(0x100000, b"code", 4)], kind=3), "fixed addresses"),
    "elf, cut headers": (GOOD[:100], "program headers are cut"),
    "elf, cut segment": (GOOD[:-1], "segment for 0x100000 is cut"),
    "elf, more in file than in memory": (elf([(0x100000, b"code", 3)]), "is cut"),
    "elf, nothing to load": (elf([]), "without anything to load"),
    "elf, entry outside": (elf([(0x100000, b"code", 4)], entry=0x100004), "entry 0x100004"),
    "elf, below 1 MiB": (elf([(0x1000, b"code", 4)], entry=0x1000), "below 1 MiB"),
    "elf, beyond RAM": (elf([(0x100000, b"code", 4), (8 * MIB - 3, b"code", 4)]), "does not fit into RAM: 4 bytes"),
    "elf, in no RAM": (elf([(0x100000, b"code", 4), (0xF000_0000, b"code", 4)]), "0xf0000000"),
    "elf, end wraps": (elf([(0x100000, b"code", 4), ((1 << 64) - 2, b"code", 4)]), "does not fit"),
    "elf, huge zeros": (elf([(0x100000, b"code", 1 << 60)]), "does not fit"),
    "linux, old": (linux(version=0x20B), "64-bit entry"),
    "linux, 32-bit": (linux(xloadflags=0), "64-bit entry"),
    "linux, cut header": (linux()[:0x220], "setup header is cut"),
    "linux, no code": (linux(code=b"x"), "cut behind its setup"),
    "linux, beyond RAM": (linux(code=bytes(7 * MIB + 1)), "does not fit into RAM"),
    "larger than RAM": (bytes(8 * MIB + 1), "larger than the guest's RAM"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_nothing_written(tmp_path: Path, case: str) -> None:
    image, words = BAD_FILES[case]
    ram = ram_of(8)
    with pytest.raises(UsageError) as caught:
        load(tmp_path, image, ram)
    message = str(caught.value)
    assert message.startswith(f"-kernel {tmp_path / 'kernel'}: ")
    assert words in message
    assert "\n" not in message
    assert ram.written == {}


@pytest.mark.parametrize(("image", "limit"), [(GOOD, 2047), (linux(), 255)])
def test_command_line_has_a_limit(tmp_path: Path, image: bytes, limit: int) -> None:
    ram = ram_of(8)
    with pytest.raises(UsageError, match=rf"{limit + 1} bytes; this kernel takes at most {limit}"):
        load(tmp_path, image, ram, append="x" * (limit + 1))
    with pytest.raises(UsageError, match="NUL"):
        load(tmp_path, image, ram, append="a\0b")
    assert ram.written == {}
    load(tmp_path, image, ram, append="x" * limit)


def test_command_line_that_is_no_utf_8_passes_as_it_is(tmp_path: Path) -> None:
    ram = ram_of(8)
    start = load(tmp_path, GOOD, ram, append=os.fsdecode(b"a\xffb"))
    assert ram.read(ram.word(start.rsi + 0x228, 4), 4) == b"a\xffb\0"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    ram = ram_of(8)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, words in ((tmp_path / "none", "no such file"), (tmp_path, "not a regular"), (fifo, "not a regular")):
        with pytest.raises(UsageError, match=words):
            load_kernel(path, "", ram.regions, ram.write)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150, deadline=None
)
@given(data=st.data())
def test_altered_files_are_loaded_or_refused_and_never_written_outside(tmp_path: Path, data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from([elf([(0x100000, b"code", 64), (0x200000, b"d", 9)]), linux()])))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, min(len(image), 0x240) - 1))] = data.draw(st.integers(0, 255))
    ram = ram_of(8)
    try:
        start = load(tmp_path, bytes(image), ram)
    except UsageError:
        assert ram.written == {}
    else:
        assert MIB <= start.rip < 8 * MIB
