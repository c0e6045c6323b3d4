"""The demo's count of RAM in a stream, against the tests' own reader and against streams that do hold RAM."""

from __future__ import annotations

import struct

import pytest

from lazymem.demo.streamscan import scan
from lazymem.errors import SaveStreamError

PAGE = 4096


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def stream(*parts: bytes, ignores: bool = True) -> bytes:
    """A stream's front as QEMU writes it, with the blocks /objects/pc.ram (8 pages) and pc.bios (2 pages). `parts`: the
    records of a section each."""
    out = b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", 2) + b"pc"
    if ignores:
        capability = struct.pack(">II", 1, 1) + name("x-ignore-shared")
        out += b"\x05" + name("configuration/capabilities") + capability
    address = bytes(8) if ignores else b""
    blocks = struct.pack(">Q", 10 * PAGE | 4)
    blocks += name("/objects/pc.ram") + struct.pack(">Q", 8 * PAGE) + address
    blocks += name("pc.bios") + struct.pack(">Q", 2 * PAGE) + address
    end = struct.pack(">Q", 0x10)
    footer = b"\x7e" + struct.pack(">I", 2)
    out += b"\x08" + struct.pack(">HH", 3, 2) + b"xx"
    out += b"\x01" + struct.pack(">I", 2) + name("ram") + struct.pack(">II", 0, 4) + blocks + end + footer
    for records in parts:
        out += b"\x03" + struct.pack(">I", 2) + records + end + footer
    return out + b"\x04 what follows is no matter"


def page(block: str, number: int, *, zero: bool = False, again: bool = False) -> bytes:
    flags = (0x02 if zero else 0x08) | (0x20 if again else 0)
    return struct.pack(">Q", number * PAGE | flags) + (b"" if again else name(block)) + (b"\0" if zero else b"x" * PAGE)


@pytest.mark.parametrize("ignores", [True, False])
def test_counts_the_pages_of_each_block(ignores: bool) -> None:
    found = scan(stream(page("pc.bios", 0) + page("pc.bios", 1, zero=True, again=True), ignores=ignores))
    assert found.sizes == {"/objects/pc.ram": 8 * PAGE, "pc.bios": 2 * PAGE}
    assert found.of_block("pc.ram") == 0
    assert found.of_block("pc.bios") == 2 * PAGE


def test_ram_in_the_stream_is_seen() -> None:
    data = stream(page("pc.bios", 0) + page("/objects/pc.ram", 3) + page("", 4, zero=True, again=True))
    assert scan(data).of_block("pc.ram") == 2 * PAGE


def test_a_section_goes_on_with_the_block_of_the_one_before() -> None:
    """QEMU names a block when it comes to another one, and not in each section. On a busy host there are several."""
    data = stream(
        page("pc.bios", 0), b"", page("", 1, again=True) + page("/objects/pc.ram", 3), page("", 4, again=True)
    )
    found = scan(data)
    assert (found.of_block("pc.bios"), found.of_block("pc.ram")) == (2 * PAGE, 2 * PAGE)
    with pytest.raises(SaveStreamError):
        scan(stream(page("", 0, again=True)))


def test_every_cut_and_every_unknown_name_is_an_error() -> None:
    data = stream(page("pc.bios", 0))
    end = data.index(b"\x04 what")
    for length in [*range(end - PAGE), *range(end - 20, end)]:
        with pytest.raises(SaveStreamError):
            scan(data[:length])
    with pytest.raises(SaveStreamError):
        scan(stream(page("other", 0)))
    with pytest.raises(KeyError):
        scan(data).of_block("vga.vram")
