"""Reads and checks a whole save stream before anything of it is believed. Pure: bytes in, a checked record out.

Checked: magic and version; machine type and capabilities; every block's name and size; every section's name, instance,
version, footer; that each page of the ordinary memory is there and none of a block whose file is its state; the digest
of each section; the description.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from lazymem.vm.devicestate import Layout, State, Value
from lazymem.vm.savestream.cursor import Cursor
from lazymem.vm.savestream.description import MAX_DESCRIPTION_BYTES, description, section_digest, told_digests
from lazymem.vm.savestream.format import (
    CAPABILITIES_NAME,
    CONFIGURATION_NAME,
    IGNORE_SHARED,
    MAGIC,
    RAM_NAME,
    RAM_VERSION,
    VERSION,
    Mark,
    StreamShape,
)
from lazymem.vm.savestream.ramrecords import RamReader

DeviceKey = tuple[str, int]
"""Name and instance."""


class SavedState(Struct, frozen=True):
    """A whole, checked stream.

    `pages`: block name to {offset in bytes: 4096 bytes, or None for zeros}. `devices`: state by (name, instance).
    """

    shape: StreamShape
    pages: dict[str, dict[int, memoryview | None]]
    devices: dict[DeviceKey, State]


def max_stream_bytes(shape: StreamShape) -> int:
    """More than any stream of this machine has: two passes over its ordinary memory, and a MiB for everything else.

    A record's head is under 1/16 of its page.
    """
    ordinary = sum(block.size for block in shape.blocks if not block.do_not_save)
    return 3 * ordinary + (1 << 20) + MAX_DESCRIPTION_BYTES


def load(data: bytes | memoryview, shape: StreamShape) -> SavedState:
    """Check all of `data` against the machine that it is to become.

    Raises:
        SaveStreamError: cut, altered, or of another machine; the text names the section.
    """
    return _Loader(data, shape).load()


class _Loader:
    def __init__(self, data: bytes | memoryview, shape: StreamShape) -> None:
        self._cursor = Cursor(data)
        self._shape = shape
        self._layouts = {(layout.name, layout.instance): layout for layout in shape.layouts}
        self._order: list[Layout] = []
        self._devices: dict[DeviceKey, State] = {}
        self._digests: list[tuple[str, str]] = []

    def load(self) -> SavedState:
        cursor = self._cursor
        cursor.expect(4, MAGIC, "magic")
        cursor.expect(4, VERSION, "file version")
        self._configuration()
        ram = RamReader(cursor, self._shape)
        self._ram(ram)
        while (mark := cursor.number(1)) == Mark.SECTION_FULL:
            self._device()
        if mark != Mark.EOF:
            raise cursor.refuse(f"{mark:#x} where a device or the end belongs")
        missing = sorted(set(self._layouts) - set(self._devices))
        if missing:
            raise cursor.refuse(f"it ends without the section {missing[0][0]}")
        self._description()
        return SavedState(self._shape, ram.pages, self._devices)

    def _configuration(self) -> None:
        cursor = self._cursor
        start = cursor.at
        cursor.section = CONFIGURATION_NAME
        cursor.expect(1, Mark.CONFIGURATION, "mark")
        length = cursor.number(4)
        machine = cursor.text(length)
        if machine != self._shape.machine:
            raise cursor.refuse(f"it is of machine type {machine!r}, this is {self._shape.machine}")
        ignore_shared = cursor.peek() == Mark.SUBSECTION
        if ignore_shared:
            cursor.take(1)
            self._capabilities()
        if any(block.do_not_save for block in self._shape.blocks) and not ignore_shared:
            raise cursor.refuse(f"it was saved without {IGNORE_SHARED}, but this machine's RAM comes from a file")
        self._shape = replace(self._shape, ignore_shared=ignore_shared)
        self._seal(CONFIGURATION_NAME, start)

    def _capabilities(self) -> None:
        cursor = self._cursor
        name = cursor.name()
        if name != CAPABILITIES_NAME:
            raise cursor.refuse(f"unknown subsection {name!r}")
        cursor.expect(4, 1, "version")
        cursor.expect(4, 1, "number of capabilities")
        capability = cursor.name()
        if capability != IGNORE_SHARED:
            raise cursor.refuse(f"unknown capability {capability!r}")

    def _ram(self, ram: RamReader) -> None:
        """START, any number of PART, END."""
        cursor = self._cursor
        start = cursor.at
        cursor.section = RAM_NAME
        cursor.expect(1, Mark.SECTION_START, "mark")
        section_id = cursor.number(4)
        self._name(RAM_NAME)
        cursor.expect(4, 0, "instance")
        cursor.expect(4, RAM_VERSION, "version")
        ram.block_list(self._shape.ignore_shared)
        ram.records()
        self._footer(section_id)
        self._seal(RAM_NAME, start)
        mark = Mark.SECTION_START.value
        while mark != Mark.SECTION_END:
            start = cursor.at
            mark = cursor.number(1)
            if mark not in (Mark.SECTION_PART, Mark.SECTION_END):
                raise cursor.refuse(f"{mark:#x} where more of the section belongs")
            cursor.expect(4, section_id, "section id")
            ram.records()
            self._footer(section_id)
            self._seal(RAM_NAME, start)
        ram.finish()

    def _device(self) -> None:
        """Behind its mark."""
        cursor = self._cursor
        start = cursor.at - 1
        cursor.section = "of a device"
        section_id = cursor.number(4)
        cursor.section = name = cursor.name()
        key = (name, cursor.number(4))
        layout = self._layouts.get(key)
        if layout is None:
            raise cursor.refuse(f"this machine has no device {name} (instance {key[1]})")
        if key in self._devices:
            raise cursor.refuse("it is there twice")
        cursor.expect(4, layout.version, "version")
        self._devices[key] = {field.name: self._value(field.size_bytes, field.buffer) for field in layout.fields}
        self._order.append(layout)
        self._footer(section_id)
        self._seal(name, start)

    def _value(self, size_bytes: int, buffer: bool) -> Value:
        return bytes(self._cursor.take(size_bytes)) if buffer else self._cursor.number(size_bytes)

    def _description(self) -> None:
        cursor = self._cursor
        cursor.section = "description"
        cursor.expect(1, Mark.DESCRIPTION, "mark")
        length = cursor.number(4)
        if length > MAX_DESCRIPTION_BYTES:
            raise cursor.refuse(f"{length} bytes are more than any description has")
        text = bytes(cursor.take(length))
        if not cursor.at_end:
            raise cursor.refuse("more bytes follow where the stream ends")
        self._compare(text)

    def _compare(self, text: bytes) -> None:
        """Against what a writer of this very stream would have put."""
        if text == description(replace(self._shape, layouts=tuple(self._order)), self._digests):
            return
        try:
            told = told_digests(text)
        except (ValueError, RecursionError) as error:
            raise self._cursor.refuse(f"it cannot be read: {error}") from error
        for (name, digest), (told_name, told_digest) in zip(self._digests, told, strict=False):
            if name == told_name and digest != told_digest:
                self._cursor.section = name
                raise self._cursor.refuse("its bytes are not those that were written")
        raise self._cursor.refuse("it does not describe this stream")

    def _name(self, expected: str) -> None:
        name = self._cursor.name()
        if name != expected:
            raise self._cursor.refuse(f"it is called {name!r}")

    def _footer(self, section_id: int) -> None:
        self._cursor.expect(1, Mark.FOOTER, "footer's mark")
        self._cursor.expect(4, section_id, "footer's section id")

    def _seal(self, name: str, start: int) -> None:
        self._digests.append((name, section_digest(self._cursor.span(start))))
