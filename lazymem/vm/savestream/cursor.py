"""Reads big-endian values from a save stream and knows in which section it is, for the error's text. Pure."""

from __future__ import annotations

from lazymem.errors import SaveStreamError
from lazymem.vm.savestream.format import MAX_NAME_BYTES


class Cursor:
    """A place in a stream. Every read beyond its end is a SaveStreamError that names the section."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self.at = 0
        self.section = "header"

    def refuse(self, reason: str) -> SaveStreamError:
        """The error to raise."""
        return SaveStreamError(f"save stream refused, section {self.section} at byte {self.at}: {reason}")

    def take(self, length: int) -> memoryview:
        if length > len(self._data) - self.at:
            raise self.refuse(f"the stream is cut: {length} more bytes belong here")
        self.at += length
        return self._data[self.at - length : self.at]

    def number(self, size_bytes: int) -> int:
        """An unsigned integer."""
        return int.from_bytes(self.take(size_bytes), "big")

    def name(self) -> str:
        """A name with its length byte."""
        return self.text(self.number(1))

    def text(self, length: int) -> str:
        """A name of so many bytes. Names stand in errors' texts: none is long, or moves a terminal's cursor."""
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.refuse(f"a name of {length} bytes")
        try:
            found = str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse("a name is not text") from error
        if not found.isprintable():
            raise self.refuse(f"a name is not text: {found!r}")
        return found

    def expect(self, size_bytes: int, value: int, what: str) -> None:
        """The next integer has to be `value`."""
        found = self.number(size_bytes)
        if found != value:
            raise self.refuse(f"{what} is {found:#x}, not {value:#x}")

    def peek(self) -> int:
        """The next byte, or -1 at the end."""
        return self._data[self.at] if self.at < len(self._data) else -1

    def span(self, start: int) -> memoryview:
        """What was read since `start`."""
        return self._data[start : self.at]

    @property
    def at_end(self) -> bool:
        return self.at == len(self._data)
