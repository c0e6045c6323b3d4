"""Reads the ram section of a save stream: block list and page records. Pure."""

from __future__ import annotations

from lazymem.pages import PAGE_SIZE
from lazymem.vm.savestream.cursor import Cursor
from lazymem.vm.savestream.format import RamFlag, StreamShape

_FLAG_BITS = PAGE_SIZE - 1


class RamReader:
    """Collects `pages`: block name to {offset in bytes: 4096 bytes, or None for zeros}; a later record replaces."""

    def __init__(self, cursor: Cursor, shape: StreamShape) -> None:
        self._cursor = cursor
        self._blocks = {block.name: block for block in shape.blocks}
        self._last = ""
        self.pages: dict[str, dict[int, memoryview | None]] = {name: {} for name in self._blocks}

    def block_list(self, ignore_shared: bool) -> None:
        """Every block of this machine, each once, with its size, and no other."""
        cursor = self._cursor
        total = cursor.number(8)
        if total & _FLAG_BITS != RamFlag.MEM_SIZE:
            raise cursor.refuse("no block list where it belongs")
        left = total - RamFlag.MEM_SIZE
        listed: set[str] = set()
        while left > 0:
            name = cursor.name()
            size = cursor.number(8)
            self._check_block(name, size, listed)
            listed.add(name)
            left -= size
            if ignore_shared:
                cursor.expect(8, 0, f"address of block {name}")
        missing = sorted(set(self._blocks) - listed)
        if left or missing:
            raise cursor.refuse(f"the block list lacks {', '.join(missing) or 'what its total says'}")

    def _check_block(self, name: str, size: int, listed: set[str]) -> None:
        block = self._blocks.get(name)
        if block is None:
            raise self._cursor.refuse(f"it has a RAM block {name!r}, this machine has {', '.join(self._blocks)}")
        if name in listed:
            raise self._cursor.refuse(f"it lists RAM block {name} twice")
        if size != block.size:
            raise self._cursor.refuse(f"RAM block {name} has {size} bytes there and {block.size} here")

    def records(self) -> None:
        """Page records up to the end of this part."""
        self._last = ""
        while True:
            word = self._cursor.number(8)
            flags = word & _FLAG_BITS
            if flags == RamFlag.END_OF_SECTION and word == flags:
                return
            self._record(word - flags, flags)

    def _record(self, offset: int, flags: int) -> None:
        cursor = self._cursor
        # ~ of an IntFlag keeps known bits only, and so would let unknown ones through.
        kind = flags & ~int(RamFlag.CONTINUE)
        if kind not in (RamFlag.ZERO, RamFlag.PAGE):
            raise cursor.refuse(f"a page record with unknown flags {flags:#x}")
        if not flags & RamFlag.CONTINUE:
            self._last = cursor.name()
        block = self._blocks.get(self._last)
        if block is None:
            raise cursor.refuse(f"a page of an unknown RAM block {self._last!r}")
        if block.do_not_save:
            raise cursor.refuse(f"it has pages of RAM block {block.name}, whose state is the file that backs it")
        if offset >= block.size:
            raise cursor.refuse(f"a page at {offset:#x}, behind the end of RAM block {block.name}")
        if kind == RamFlag.PAGE:
            self.pages[block.name][offset] = cursor.take(PAGE_SIZE)
        else:
            cursor.expect(1, 0, "a filled page's byte")
            self.pages[block.name][offset] = None

    def finish(self) -> None:
        """Each block of ordinary memory is whole. A privately mapped file may stand in for all pages, not for some."""
        for block in self._blocks.values():
            found, wanted = len(self.pages[block.name]), block.size // PAGE_SIZE
            if block.do_not_save or (block.backed and not found):
                continue
            if found != wanted:
                raise self._cursor.refuse(f"RAM block {block.name} has {found} of its {wanted} pages")
