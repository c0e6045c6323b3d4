"""What an emulator sends, cut where its pages end, and the pages of a screen in it that are candidates. Pure.

In the pass while the guest runs the display's pages are kept, for whoever wants to know which of them it writes. In the
last one each page that is equal to a candidate is told of: the bytes that the emulator really sends say so.
"""

from __future__ import annotations

from collections.abc import Collection

from lazymem.handover.candidates import MOST_BYTES, Candidates, Reference
from lazymem.handover.pagerecords import Block, Page, PageRecords
from lazymem.handover.statepieces import MAX_PIECE_BYTES
from lazymem.pages import PAGE_SIZE

_SOON_BYTES = 64 * 1024
"""A piece between a screen and the stop: the link shall have something to do soon."""


_HOLD_BYTES = 96 * 1024
"""The emulator is held so long before the end of the largest block behind the display's, a firmware, which has most of
its bytes there: a little more than what an emulator has in hand then (QEMU 32 KiB, and the socket's 16)."""


class ScreenStream:
    """For one thread, but for `watch`. `display`: the block, once it is known; `sent`: its pages as they went in the
    first pass, by their offsets; `is_past`: that pass is near its end, see `_hold_at`."""

    def __init__(self) -> None:
        self._places: frozenset[tuple[int, int]] = frozenset()
        self._records = PageRecords()
        self._unread = b""
        self.display: Block | None = None
        self.sent: dict[int, bytes] = {}
        self._hold_at: tuple[bytes, int] | None = None
        self.is_past = False
        self.candidates = Candidates()

    def watch(self, places: Collection[tuple[int, int]]) -> None:
        """Before the emulator sends: where the guest has its displays' memory, address and size. Without that all
        goes on as it comes."""
        self._places = frozenset(places)

    @property
    def room(self) -> int:
        """So much of the stream at a time."""
        is_soon = self.is_past and not self._records.is_last_pass
        return max(PAGE_SIZE, (_SOON_BYTES if is_soon else MAX_PIECE_BYTES) - len(self._unread))

    @property
    def is_watched(self) -> bool:
        return bool(self._places)

    def take(self, data: bytes) -> tuple[bytes, list[Reference]]:
        """What can go on by now, and the candidates in it. Nothing of a record that is not whole yet."""
        if not self._places:
            return data, []
        data = self._unread + data
        done, pages = self._records.feed(data)
        self._unread = data[done:]
        if self.display is None:
            self._find_display()
        found: list[Reference] = []
        for page in pages:
            is_shown = self.display is not None and page.block == self.display.name
            if page.is_last:
                if is_shown and self.candidates.is_equal(page.offset, data, page.at):
                    found.append(Reference(page.at, page.offset))
            elif not is_shown:
                self.is_past |= bool(self.sent) and self._is_near_end(page)
            elif page.offset < MOST_BYTES:
                self.sent[page.offset] = data[page.at : page.at + PAGE_SIZE]
        return data[:done], found

    def _find_display(self) -> None:
        blocks = self._records.blocks
        at = next((i for i, block in enumerate(blocks) if (block.address, block.size) in self._places), len(blocks))
        if behind := blocks[at + 1 :]:
            self.display = blocks[at]
            largest = max(behind, key=lambda block: block.size)
            self._hold_at = largest.name, largest.size - _HOLD_BYTES

    def _is_near_end(self, page: Page) -> bool:
        return self._hold_at is not None and page.block == self._hold_at[0] and page.offset >= self._hold_at[1]

    def rest(self) -> bytes:
        """What is left at the stream's end."""
        data, self._unread = self._unread, b""
        return data
