"""Writes a save stream: each method returns its next bytes. Pure; the caller sends them, and reads RAM and devices.

Order of calls: `begin`, `ram_pages` any number of times (also while the guest runs), `ram_end`, `device` once for each
layout, `end`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from lazymem.pages import is_zero
from lazymem.vm.devicestate import Field, Layout, State
from lazymem.vm.savestream.description import description, section_digest
from lazymem.vm.savestream.format import (
    CAPABILITIES_NAME,
    CONFIGURATION_NAME,
    IGNORE_SHARED,
    MAGIC,
    RAM_NAME,
    RAM_SECTION_ID,
    RAM_VERSION,
    VERSION,
    BlockShape,
    Mark,
    Page,
    RamFlag,
    StreamShape,
)


class StreamWriter:
    """One stream. A call out of order, or a page of a block that is not saved, is a bug of the caller: ValueError."""

    def __init__(self, shape: StreamShape) -> None:
        self._shape = shape
        self._saved = {block.name: block.size for block in shape.blocks if not block.do_not_save}
        self._digests: list[tuple[str, str]] = []
        self._devices = 0
        self._ram_open = False

    def begin(self) -> bytes:
        """Magic, configuration, and the ram section's block list."""
        if self._digests:
            raise ValueError("a stream begins once")
        self._ram_open = True
        configuration = self._section(CONFIGURATION_NAME, configuration_section(self._shape))
        head = section_head(Mark.SECTION_START, RAM_SECTION_ID, RAM_NAME, 0, RAM_VERSION)
        ram = self._section(RAM_NAME, head + _block_list(self._shape) + _ram_tail())
        return struct.pack(">II", MAGIC, VERSION) + configuration + ram

    def ram_pages(self, pages: Iterable[Page]) -> bytes:
        """A part of the ram section. Zero pages are found here; a page may come again, the last one counts."""
        return self._ram(Mark.SECTION_PART, pages)

    def ram_end(self) -> bytes:
        """The ram section's last part."""
        data = self._ram(Mark.SECTION_END, ())
        self._ram_open = False
        return data

    def device(self, state: State) -> bytes:
        """The section of the shape's next layout."""
        if self._ram_open or self._devices >= len(self._shape.layouts):
            raise ValueError("devices come after the ram section, one for each layout")
        layout = self._shape.layouts[self._devices]
        self._devices += 1
        section_id = RAM_SECTION_ID + self._devices
        head = section_head(Mark.SECTION_FULL, section_id, layout.name, layout.instance, layout.version)
        return self._section(layout.name, head + _fields(layout, state) + footer(section_id))

    def end(self) -> bytes:
        """End mark and description."""
        if self._devices != len(self._shape.layouts):
            raise ValueError("a device's section is missing")
        text = description(self._shape, self._digests)
        return struct.pack(">BBI", Mark.EOF, Mark.DESCRIPTION, len(text)) + text

    def _section(self, name: str, data: bytes) -> bytes:
        self._digests.append((name, section_digest(data)))
        return data

    def _ram(self, mark: Mark, pages: Iterable[Page]) -> bytes:
        if not self._ram_open:
            raise ValueError("the ram section is not open")
        parts = [struct.pack(">BI", mark, RAM_SECTION_ID)]
        last = ""
        for page in pages:
            if page.offset >= self._saved.get(page.block, 0):
                raise ValueError(f"no page at {page.offset:#x} of RAM block {page.block} belongs into the stream")
            parts.append(_page_record(page, same_block=page.block == last))
            last = page.block
        parts.append(_ram_tail())
        return self._section(RAM_NAME, b"".join(parts))


def configuration_section(shape: StreamShape) -> bytes:
    """Machine type and capabilities."""
    machine = shape.machine.encode()
    data = struct.pack(">BI", Mark.CONFIGURATION, len(machine)) + machine
    if shape.ignore_shared:
        data += struct.pack(">B", Mark.SUBSECTION) + name_bytes(CAPABILITIES_NAME) + struct.pack(">II", 1, 1)
        data += name_bytes(IGNORE_SHARED)
    return data


def name_bytes(name: str) -> bytes:
    """A name with its length byte."""
    data = name.encode()
    return bytes([len(data)]) + data


def section_head(mark: Mark, section_id: int, name: str, instance: int, version: int) -> bytes:
    return struct.pack(">BI", mark, section_id) + name_bytes(name) + struct.pack(">II", instance, version)


def footer(section_id: int) -> bytes:
    return struct.pack(">BI", Mark.FOOTER, section_id)


def _block_list(shape: StreamShape) -> bytes:
    """Every block, saved or not: the loading side checks names and sizes of all."""
    total = sum(block.size for block in shape.blocks)
    return struct.pack(">Q", total | RamFlag.MEM_SIZE) + b"".join(
        _block_entry(block, shape.ignore_shared) for block in shape.blocks
    )


def _block_entry(block: BlockShape, ignore_shared: bool) -> bytes:
    entry = name_bytes(block.name) + struct.pack(">Q", block.size)
    # The address of the block within its container, which is 0 for each of ours.
    return entry + (struct.pack(">Q", 0) if ignore_shared else b"")


def _page_record(page: Page, *, same_block: bool) -> bytes:
    flags = RamFlag.CONTINUE if same_block else RamFlag(0)
    name = b"" if same_block else name_bytes(page.block)
    if page.data is None or is_zero(page.data):
        return struct.pack(">Q", page.offset | flags | RamFlag.ZERO) + name + b"\0"
    return struct.pack(">Q", page.offset | flags | RamFlag.PAGE) + name + page.data


def _ram_tail() -> bytes:
    return struct.pack(">Q", RamFlag.END_OF_SECTION) + footer(RAM_SECTION_ID)


def _fields(layout: Layout, state: State) -> bytes:
    if set(state) != {field.name for field in layout.fields}:
        raise ValueError(f"state of {layout.name} does not have exactly its layout's fields")
    return b"".join(_field(layout, field, state) for field in layout.fields)


def _field(layout: Layout, field: Field, state: State) -> bytes:
    value = state[field.name]
    if field.buffer:
        if not isinstance(value, bytes) or len(value) != field.size_bytes:
            raise ValueError(f"{layout.name}.{field.name} is not {field.size_bytes} bytes")
        return value
    if not isinstance(value, int) or not 0 <= value < 1 << (8 * field.size_bytes):
        raise ValueError(f"{layout.name}.{field.name} is not an unsigned integer of {field.size_bytes} bytes")
    return value.to_bytes(field.size_bytes, "big")
