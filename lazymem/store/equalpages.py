"""Where a page with the same bytes is held already, by digests, so that it need not cross the wire again. Pure.

Equal files in page caches, and patterns that a kernel or an allocator fills memory with, stand in RAM many times. A
table of fixed size remembers where digests were kept last; it is a hint: whoever uses it compares the whole digest.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

from lazymem.digests import ZERO_PAGE_DIGEST
from lazymem.pages import PageRange

SLOTS = 1 << 17
"""2 MiB, for 512 MiB of different pages; of more RAM the pages that were kept last, or repeat, are remembered."""

_EACH = struct.Struct("<QQ")  # a digest: the first half is its key
_ZERO_KEY = _EACH.unpack(ZERO_PAGE_DIGEST)[0]


class EqualPages:
    """`note` what is held, then ask for `candidates`."""

    def __init__(self, slots: int = SLOTS) -> None:
        """`slots`: a power of two."""
        self._mask = slots - 1
        self._keys = array("Q", bytes(8 * slots))
        self._pages = array("Q", bytes(8 * slots))

    def note(self, pages: PageRange, digests: bytes) -> None:
        """`pages` with these digests (16 bytes each) are held."""
        for page, (key, _) in enumerate(_EACH.iter_unpack(digests), pages.start):
            slot = key & self._mask
            self._keys[slot] = key
            self._pages[slot] = page

    def claim(self, first_page: int, digests: bytes) -> Iterator[tuple[int, int]]:
        """As `candidates`; every other page from `first_page` on is remembered, as if it were held: it is being asked
        for, and nobody needs to ask for its like meanwhile."""
        for page, (key, _) in enumerate(_EACH.iter_unpack(digests), first_page):
            slot = key & self._mask
            if key in (0, _ZERO_KEY):
                continue
            if self._keys[slot] == key and self._pages[slot] != page:
                yield page, self._pages[slot]
            else:
                self._keys[slot] = key
                self._pages[slot] = page

    def candidates(self, first_page: int, digests: bytes) -> Iterator[tuple[int, int]]:
        """Pages from `first_page` on, by their digests, each with one that is held and likely has the same bytes."""
        for page, (key, _) in enumerate(_EACH.iter_unpack(digests), first_page):
            slot = key & self._mask
            if self._keys[slot] == key and key not in (0, _ZERO_KEY) and self._pages[slot] != page:
                yield page, self._pages[slot]
