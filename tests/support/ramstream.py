"""Streams as an emulator sends them, as far as their pages go: a list of blocks, passes of page records, devices."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lazymem.handover.pagerecords import Block
from lazymem.vm.savestream.format import Mark, RamFlag

SECTION = 2
FOOTER = struct.pack(">BI", Mark.FOOTER, SECTION)
END_OF_PASS = struct.pack(">Q", RamFlag.END_OF_SECTION) + FOOTER


def beginning(blocks: Sequence[Block]) -> bytes:
    """Up to the first pass."""
    shapes = b"".join(bytes([len(b.name)]) + b.name + struct.pack(">QQ", b.size, b.address) for b in blocks)
    total = sum(block.size for block in blocks) | RamFlag.MEM_SIZE
    start = struct.pack(">BI", Mark.SECTION_START, SECTION) + b"\x03ram" + struct.pack(">II", 0, 4)
    return b"QEVM\0\0\0\3" + start + struct.pack(">Q", total) + shapes + END_OF_PASS


def one_pass(pages: Sequence[tuple[bytes, int, bytes | None]], *, is_last: bool) -> bytes:
    """Of pages: block, offset, bytes; None: zeros."""
    parts = [struct.pack(">BI", Mark.SECTION_END if is_last else Mark.SECTION_PART, SECTION)]
    before = None
    for block, offset, maybe_bytes in pages:
        flags = (RamFlag.PAGE if maybe_bytes is not None else RamFlag.ZERO) | (RamFlag.CONTINUE * (block == before))
        name = b"" if block == before else bytes([len(block)]) + block
        parts += [struct.pack(">Q", offset | flags), name, maybe_bytes if maybe_bytes is not None else b"\0"]
        before = block
    return b"".join([*parts, END_OF_PASS])
