"""Marks, flags and shapes of the save stream. Pure.

The format is QEMU's (version 3 of its file, as QEMU >= 9 writes it), from its documentation
(docs/devel/migration/main.rst) and the behaviour of its analyser; all integers are big-endian:

    magic u32, version u32
    configuration   0x07, machine type, subsection with the capabilities
    ram START       0x01, id u32, name, instance u32, version u32, block list, footer
    ram PART        0x02, id u32, page records, footer          (any number)
    ram END         0x03, id u32, page records, footer
    device          0x04, id u32, name, instance u32, version u32, fields, footer   (one a device)
    EOF             0x00
    description     0x06, length u32, JSON

A name is a length byte and its bytes; a footer is 0x7e and the section's id.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from lazymem.vm.devicestate import Layout

MAGIC = 0x5145564D
VERSION = 3
RAM_NAME = "ram"
RAM_SECTION_ID = 2
"""Any number would do; QEMU's streams have the ram section under this one too."""
RAM_VERSION = 4
CONFIGURATION_NAME = "configuration"
CAPABILITIES_NAME = "configuration/capabilities"
IGNORE_SHARED = "x-ignore-shared"

MAX_NAME_BYTES = 127
"""A length byte would allow 255, but QEMU's analyser reads it as signed."""


class Mark(enum.IntEnum):
    """The byte that starts each part of the stream."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    FOOTER = 0x7E


class RamFlag(enum.IntFlag):
    """Low bits of a page record's u64; the rest is the page's offset in its block, in bytes."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    END_OF_SECTION = 0x10
    CONTINUE = 0x20
    """The record is for the same block as the one before; no name follows."""


class BlockShape(Struct, frozen=True):
    """A RAM block as the stream lists it: name, size in bytes.

    `backed`: a file maps it here. `do_not_save`: that file is its state, so the stream never has a page of it.
    """

    name: str
    size: int
    backed: bool = False
    do_not_save: bool = False


class StreamShape(Struct, frozen=True):
    """What a machine's stream consists of: writer and loader are given the same.

    `machine` is the versioned machine type; a change to what the stream means takes a new one.
    """

    machine: str
    blocks: tuple[BlockShape, ...]
    layouts: tuple[Layout, ...]
    ignore_shared: bool = True

    def __post_init__(self) -> None:
        for name in [self.machine, *(b.name for b in self.blocks), *(layout.name for layout in self.layouts)]:
            if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
                raise ValueError(f"{name!r} does not fit a name of 1 to {MAX_NAME_BYTES} bytes")
        if self.blocks and not self.ignore_shared and any(block.do_not_save for block in self.blocks):
            raise ValueError("a block that is not saved needs x-ignore-shared")


class Page(Struct, frozen=True):
    """A page record: offset in bytes within `block`, and its 4096 bytes, or None for zeros."""

    block: str
    offset: int
    data: bytes | memoryview | None
