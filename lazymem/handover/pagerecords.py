"""Finds the pages in an emulator's stream while that goes by. Pure.

Of the stream (`vm/savestream/format.py`) only the ram section is read: its list of blocks, and the page records of the
pass while the guest runs and of the one behind the stop. What is found is a hint: whoever uses it looks at the bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from msgspec import Struct

from lazymem.pages import PAGE_SIZE
from lazymem.vm.savestream.format import RAM_NAME, RAM_VERSION, Mark, RamFlag

_FLAG_BITS = PAGE_SIZE - 1
_NAME = bytes([len(RAM_NAME)]) + RAM_NAME.encode() + struct.pack(">II", 0, RAM_VERSION)
_NUMBER = struct.Struct(">Q")
_SHAPE = struct.Struct(">QQ")
_MARK_BYTES = 5
"""A mark, or a footer, and its section's number."""

_COMMAND = 0x08
"""A mark that QEMU says between passes from 10 on: number, length (2 bytes each), and so many bytes."""

_MOST_UNREAD_BYTES = 128 * 1024
"""No record, and no list of blocks, is as long: what is, is something else."""

_ZEROS = re.compile(rb"(?:.{6}[\x00\x10\x20\x30\x40\x50\x60\x70\x80\x90\xa0\xb0\xc0\xd0\xe0\xf0]\x22\x00)+", re.DOTALL)
"""Records of zero pages of the same block: most of a framebuffer, and 5 ms if each were looked at by itself."""


class Block(Struct, frozen=True):
    """`address`: where the guest has it, for the blocks that have one."""

    name: bytes
    size: int
    address: int


class Page(Struct, frozen=True):
    """`at`: where its bytes begin in what was fed. `offset`: in its block, in bytes. `is_last`: sent while the guest
    stands."""

    at: int
    offset: int
    block: bytes
    is_last: bool


class _CutError(Exception):
    """The rest of it is not here yet."""


class PageRecords:
    """`blocks`: once they are known. `is_last_pass`: the guest stands. `is_over`: no more pages will be found."""

    def __init__(self) -> None:
        self.blocks: tuple[Block, ...] = ()
        self.is_last_pass = self.is_over = False
        self._block = self._number = b""
        self._step: Callable[[bytes, int, list[Page]], int] = self._beginning

    def feed(self, data: bytes) -> tuple[int, list[Page]]:
        """How many of these bytes are read, all of which are whole records, and the pages among them. The others have
        to be fed again, with more behind them."""
        at, found = 0, list[Page]()
        try:
            while at < len(data) and not self.is_over:
                at = self._step(data, at, found)
        except _CutError:
            self.is_over = len(data) - at > _MOST_UNREAD_BYTES
        return len(data) if self.is_over else at, found

    def _beginning(self, data: bytes, at: int, found: list[Page]) -> int:
        begun = data.find(_NAME, at)
        if begun < 4:
            raise _CutError
        number, at = data[begun - 4 : begun], begun + len(_NAME)
        left = self._word(data, at) & ~_FLAG_BITS
        at += _NUMBER.size
        blocks: list[Block] = []
        while left > 0:
            name, at = self._text(data, at)
            size, address = _SHAPE.unpack(_piece(data, at, _SHAPE.size))
            at += _SHAPE.size
            left -= max(size, PAGE_SIZE)
            blocks.append(Block(name, size, address))
        self.blocks, self._number = tuple(blocks), number
        self._step = self._record
        return at

    def _record(self, data: bytes, at: int, found: list[Page]) -> int:
        word = self._word(data, at)
        at += _NUMBER.size
        flags = word & _FLAG_BITS
        if flags == RamFlag.END_OF_SECTION:
            if _piece(data, at, _MARK_BYTES) != bytes([Mark.FOOTER]) + self._number:
                return self._end(at)
            self._step = self._between
            return at + _MARK_BYTES
        block = self._block
        if not flags & RamFlag.CONTINUE:
            block, at = self._text(data, at)
        kind = flags & ~int(RamFlag.CONTINUE)
        if kind == RamFlag.PAGE:
            _piece(data, at + PAGE_SIZE - 1, 1)
            found.append(Page(at, word - flags, block, self.is_last_pass))
            at += PAGE_SIZE
        elif kind == RamFlag.ZERO:
            _piece(data, at, 1)
            more = _ZEROS.match(data, at + 1)
            at = more.end() if more else at + 1
        else:
            return self._end(at)
        self._block = block
        return at

    def _between(self, data: bytes, at: int, found: list[Page]) -> int:
        begin = _piece(data, at, _MARK_BYTES)
        if begin[0] == _COMMAND:
            length = int.from_bytes(begin[3:])
            _piece(data, at + _MARK_BYTES, length)
            return at + _MARK_BYTES + length
        if begin[0] not in (Mark.SECTION_PART, Mark.SECTION_END) or begin[1:] != self._number:
            return self._end(at)
        self.is_last_pass = begin[0] == Mark.SECTION_END
        self._step = self._record
        return at + _MARK_BYTES

    def _end(self, at: int) -> int:
        """What comes now is no page: devices, or something that this does not know."""
        self.is_over = True
        return at

    def _word(self, data: bytes, at: int) -> int:
        if len(data) - at < _NUMBER.size:
            raise _CutError
        return int(_NUMBER.unpack_from(data, at)[0])

    def _text(self, data: bytes, at: int) -> tuple[bytes, int]:
        length = _piece(data, at, 1)[0]
        return _piece(data, at + 1, length), at + 1 + length


def _piece(data: bytes, at: int, length: int) -> bytes:
    if len(data) - at < length:
        raise _CutError
    return data[at : at + length]
