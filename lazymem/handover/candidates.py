"""Pages that are at the destination before the guest stands, and what is left of a piece that has them in it. Pure.

A table of references is, for each page that was cut out, the position of its bytes in the piece and the candidate's
offset (4 bytes each, little-endian), by ascending positions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from msgspec import Struct

from lazymem.errors import SaveStreamError
from lazymem.pages import PAGE_SIZE

MOST_BYTES = 16 << 20
"""Of a block, from its begin: a screen of 2560 x 1600 pixels, and all that a destination is made to hold."""

_ENTRY = struct.Struct("<II")
ENTRY_BYTES = _ENTRY.size


class Reference(Struct, frozen=True):
    """At `position` of a piece are the bytes of the candidate of that `offset`."""

    position: int
    offset: int


class Candidates:
    """By their offsets in one block."""

    def __init__(self) -> None:
        self._pages: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def keep(self, offset: int, data: bytes) -> None:
        """Instead of what was there.

        Raises:
            SaveStreamError: that is no place for them, or they are no whole pages.
        """
        if offset % PAGE_SIZE or len(data) % PAGE_SIZE or offset + len(data) > MOST_BYTES:
            raise SaveStreamError(f"the source sends {len(data)} bytes as pages at {offset} of its guest's screen")
        for at in range(0, len(data), PAGE_SIZE):
            self._pages[offset + at] = data[at : at + PAGE_SIZE]

    def is_equal(self, offset: int, data: bytes, at: int) -> bool:
        """Whether the page at `at` of `data` is the candidate of that offset."""
        maybe_page = self._pages.get(offset)
        return maybe_page is not None and data.startswith(maybe_page, at)

    def put_together(self, table: bytes, rest: bytes, length: int) -> bytes:
        """The piece of which `cut_out` has made these, of so many bytes.

        Raises:
            SaveStreamError: they do not fit each other, or what is here.
        """
        # First: a table of nothing but pages names 500 times its own size.
        if len(table) // ENTRY_BYTES * PAGE_SIZE + len(rest) != length:
            raise SaveStreamError(f"the source's references do not make a piece of {length} bytes")
        parts: list[bytes] = []
        taken = end = 0
        for position, offset in _ENTRY.iter_unpack(table):
            count, maybe_page = position - end, self._pages.get(offset)
            if maybe_page is None or not 0 <= count <= len(rest) - taken:
                raise SaveStreamError(f"the source names a page of its guest's screen that does not fit: {offset}")
            parts += [rest[taken : taken + count], maybe_page]
            taken += count
            end = position + PAGE_SIZE
        return b"".join([*parts, rest[taken:]])


def cut_out(data: bytes, found: Sequence[Reference]) -> tuple[bytes, bytes]:
    """The table, and the bytes that are left. `found` by ascending positions, none within another's page."""
    parts: list[bytes] = []
    at = 0
    for reference in found:
        parts.append(data[at : reference.position])
        at = reference.position + PAGE_SIZE
    table = b"".join(_ENTRY.pack(reference.position, reference.offset) for reference in found)
    return table, b"".join([*parts, data[at:]])
