"""Counts the RAM pages in a save stream, of QEMU's or of lazymem-vm's, block by block. Pure.

Reads the stream's front only: header, configuration and the ram section, which comes before all devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lazymem.pages import PAGE_SIZE
from lazymem.vm.savestream.cursor import Cursor
from lazymem.vm.savestream.format import CAPABILITIES_NAME, IGNORE_SHARED, MAGIC, VERSION, Mark, RamFlag

_COMMAND = 0x08
"""A mark that QEMU uses and lazymem-vm does not: u16 command, u16 length, that many bytes."""

_FLAG_BITS = PAGE_SIZE - 1


@dataclass(slots=True)
class RamInStream:
    """`sizes`: each listed block's size in bytes. `page_bytes`: bytes of its pages that the stream carries (zero pages
    count as the whole pages that they stand for)."""

    sizes: dict[str, int] = field(default_factory=dict)
    page_bytes: dict[str, int] = field(default_factory=dict)

    def of_block(self, name: str) -> int:
        """Bytes of the block `name`, whose full name may have a path before it (QEMU: /objects/pc.ram)."""
        found = [full for full in self.sizes if full == name or full.endswith(f"/{name}")]
        if len(found) != 1:
            raise KeyError(f"the stream lists {len(found)} blocks {name}, not one")
        return self.page_bytes[found[0]]


def scan(data: bytes | memoryview) -> RamInStream:
    """What the stream says and carries of RAM.

    Raises:
        SaveStreamError: it is not a stream, or not one that begins with its RAM.
    """
    cursor = Cursor(data)
    found = RamInStream()
    cursor.expect(4, MAGIC, "magic")
    cursor.expect(4, VERSION, "version")
    ignores = _configuration(cursor) if cursor.peek() == Mark.CONFIGURATION else False
    last = ""
    while (mark := cursor.peek()) in (Mark.SECTION_START, Mark.SECTION_PART, Mark.SECTION_END, _COMMAND):
        cursor.take(1)
        if mark == _COMMAND:
            cursor.take(2)
            cursor.take(cursor.number(2))
            continue
        section = cursor.number(4)
        if mark == Mark.SECTION_START:
            cursor.section = cursor.name()
            if cursor.section != "ram":
                raise cursor.refuse("a section before the devices that is not RAM")
            cursor.take(8)  # instance and version
            _block_list(cursor, found, ignores)
        last = _records(cursor, found, last)
        cursor.expect(1, Mark.FOOTER, "footer")
        cursor.expect(4, section, "footer's section")
    if not found.sizes or mark not in (Mark.SECTION_FULL, Mark.EOF):
        raise cursor.refuse("no ram section with devices behind it")
    return found


def _configuration(cursor: Cursor) -> bool:
    """Machine type and subsections; whether shared blocks are left out."""
    cursor.section = "configuration"
    cursor.take(1)
    cursor.text(cursor.number(4))
    ignores = False
    while cursor.peek() == Mark.SUBSECTION:
        cursor.take(1)
        if cursor.name() != CAPABILITIES_NAME:
            raise cursor.refuse("a subsection that is not known here")
        cursor.take(4)
        ignores |= IGNORE_SHARED in [cursor.name() for _ in range(cursor.number(4))]
    return ignores


def _block_list(cursor: Cursor, found: RamInStream, ignores: bool) -> None:
    left = cursor.number(8) - RamFlag.MEM_SIZE
    while left > 0:
        name = cursor.name()
        found.sizes[name] = cursor.number(8)
        found.page_bytes[name] = 0
        left -= found.sizes[name]
        if ignores:
            cursor.take(8)  # its address


def _records(cursor: Cursor, found: RamInStream, name: str) -> str:
    """`name`: the block of the record before these, "" if there is none; returns that of the last one. A QEMU that
    sends its RAM in several sections, as on a busy host, does not name a block again in the next one."""
    while True:
        flags = cursor.number(8) & _FLAG_BITS
        if flags & RamFlag.END_OF_SECTION:
            return name
        if not flags & RamFlag.CONTINUE:
            name = cursor.name()
        if name not in found.sizes or not flags & (RamFlag.PAGE | RamFlag.ZERO):
            raise cursor.refuse(f"a record with flags {flags:#x} of block {name!r}")
        found.page_bytes[name] += PAGE_SIZE
        cursor.take(PAGE_SIZE if flags & RamFlag.PAGE else 1)
