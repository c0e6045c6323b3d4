"""A reader of QEMU save streams, written from QEMU's documentation and apart from lazymem's writer and loader.

It believes the stream's own JSON description, as QEMU's analyser does, so it reads real QEMU's streams too (7.2, whose
description lacks "configuration", and newer). It checks structure and says what is in the stream; it does not know
lazymem's devices.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

PAGE = 4096


class StreamFormatError(Exception):
    """Not a QEMU save stream, or a broken one."""


@dataclass
class Section:
    """A device's section: JSON's field name to integer or bytes (of repeated names the last)."""

    section_id: int
    name: str
    instance: int
    version: int
    fields: dict[str, int | bytes] = field(default_factory=dict)


@dataclass
class Stream:
    machine: str = ""
    capabilities: list[str] = field(default_factory=list)
    blocks: dict[str, int] = field(default_factory=dict)
    """RAM block name to size in bytes."""
    addresses: dict[str, int] = field(default_factory=dict)
    page_records: list[tuple[str, int, bytes | None]] = field(default_factory=list)
    """(block, offset, bytes or None for zero), in stream order."""
    ram_parts: int = 0
    devices: list[Section] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)

    def memory(self, block: str) -> bytes:
        """A block's final bytes; pages that the stream lacks read as zero."""
        image = bytearray(self.blocks[block])
        for name, offset, data in self.page_records:
            if name == block:
                image[offset : offset + PAGE] = data or bytes(PAGE)
        return bytes(image)

    def pages_of(self, block: str) -> int:
        """How many page records there are for `block`."""
        return sum(name == block for name, _, _ in self.page_records)

    def device(self, name: str) -> Section:
        return next(section for section in self.devices if section.name == name)


def read_stream(data: bytes) -> Stream:
    """Read all of a stream, up to its last byte."""
    return _Reader(data).read()


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)
        self.size = len(data)
        self.out = Stream()
        self.ram_id = -1
        self.block = ""  # of the last page; the next section goes on with it
        self.out.description = self._find_description(data)

    def _find_description(self, data: bytes) -> dict[str, Any]:
        """The JSON has no NUL byte and its length does, so it starts behind the last one."""
        start = data.index(b"{", data.rindex(b"\0"))
        if data[start - 5] != 6 or int.from_bytes(data[start - 4 : start], "big") != len(data) - start:
            raise StreamFormatError("no description at the end")
        found = json.loads(data[start:])
        assert isinstance(found, dict)
        return found

    def raw(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise StreamFormatError(f"cut at {self.file.tell()}")
        return data

    def u(self, count: int) -> int:
        return int.from_bytes(self.raw(count), "big")

    def string(self) -> str:
        return self.raw(self.u(1)).decode()

    def expect(self, found: object, wanted: object, what: str) -> None:
        if found != wanted:
            raise StreamFormatError(f"{what} is {found!r}, not {wanted!r}, at {self.file.tell()}")

    def read(self) -> Stream:
        self.expect(self.raw(4), b"QEVM", "magic")
        self.expect(self.u(4), 3, "version")
        while kind := self.u(1):
            if kind == 7:
                self.configuration()
                continue
            if kind == 8:  # a command: u16 type, u16 length
                self.u(2)
                self.raw(self.u(2))
                continue
            section_id = self.u(4)
            if kind in (1, 4):
                self.new_section(section_id)
            elif kind in (2, 3):
                self.expect(section_id, self.ram_id, "section id of a part")
                self.ram_part()
            else:
                raise StreamFormatError(f"unknown section type {kind} at {self.file.tell()}")
            self.expect(self.u(1), 0x7E, "footer")
            self.expect(self.u(4), section_id, "footer's id")
        self.expect(self.u(1), 6, "description's mark")
        self.raw(self.u(4))
        self.expect(self.file.tell(), self.size, "end")
        return self.out

    def configuration(self) -> None:
        self.out.machine = self.raw(self.u(4)).decode()
        while True:
            mark = self.file.read(1)
            if mark != b"\x05":
                self.file.seek(-len(mark), io.SEEK_CUR)
                return
            self.expect(self.string(), "configuration/capabilities", "subsection")
            self.expect(self.u(4), 1, "subsection's version")
            self.out.capabilities = [self.string() for _ in range(self.u(4))]

    def new_section(self, section_id: int) -> None:
        section = Section(section_id, self.string(), self.u(4), self.u(4))
        if section.name == "ram":
            self.expect(section.version, 4, "ram version")
            self.ram_id = section_id
            self.ram_part()
            return
        wanted = (section.name, section.instance)
        devices = self.out.description["devices"]
        device = next((d for d in devices if (d["name"], d["instance_id"]) == wanted), None)
        if device is None:
            raise StreamFormatError(f"section {wanted} is not described")
        # Devices from before VMState have no version in the description.
        self.expect(section.version, device.get("version", section.version), f"version of {section.name}")
        self.fields(device, section.fields)
        self.out.devices.append(section)

    def fields(self, struct: dict[str, Any], into: dict[str, int | bytes]) -> None:
        for entry in struct.get("fields", []):
            for _ in range(entry.get("array_len", 1)):
                self.field(entry, into)
        for sub in struct.get("subsections", []):
            self.expect(self.u(1), 5, "subsection's mark")
            self.expect(self.string(), sub["vmsd_name"], "subsection")
            self.expect(self.u(4), sub["version"], "subsection's version")
            self.fields(sub, into)

    def field(self, entry: dict[str, Any], into: dict[str, int | bytes]) -> None:
        if entry["type"] == "struct":
            self.fields(entry["struct"], into)
            return
        data = self.raw(entry["size"])
        number = entry["type"].startswith(("uint", "int")) and entry["size"] in (1, 2, 4, 8)
        into[entry["name"]] = int.from_bytes(data, "big") if number else data

    def ram_part(self) -> None:
        self.out.ram_parts += 1
        while True:
            word = self.u(8)
            flags, offset = word % PAGE, word - word % PAGE
            if flags & 0x04:
                self.block_list(offset)
                continue
            if flags & 0x10:
                return
            if not flags & 0x20:
                self.block = self.string()
            block = self.block
            if block not in self.out.blocks or offset >= self.out.blocks[block]:
                raise StreamFormatError(f"page {offset:#x} of {block!r} is in no block")
            if flags & 0x02:
                self.expect(self.u(1), 0, "fill byte")
                self.out.page_records.append((block, offset, None))
            elif flags & 0x08:
                self.out.page_records.append((block, offset, self.raw(PAGE)))
            else:
                raise StreamFormatError(f"page record with flags {flags:#x}")

    def block_list(self, total: int) -> None:
        while total > 0:
            name = self.string()
            self.out.blocks[name] = self.u(8)
            total -= self.out.blocks[name]
            if "x-ignore-shared" in self.out.capabilities:
                self.out.addresses[name] = self.u(8)
        self.expect(total, 0, "rest of the block list's total")
