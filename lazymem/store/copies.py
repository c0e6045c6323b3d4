"""Missing pages that are equal to others, which are held or on their way: copied from those, and not fetched.

Found by digests (`equalpages`, a hint), and copied only while the digests of both say the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from lazymem.pages import PageRange, runs
from lazymem.store.equalpages import EqualPages
from lazymem.store.pagemap import SET, UNSET, PageMap

COPIES_A_TURN = 32
"""Equal pages that are read and verified before others get a turn: a third of a millisecond."""

COPIES_A_WRITE = 256
"""And all that one call of `some` reads: pages that wait to be kept hold up faults in the end."""

MAX_COPIES = 1 << 16
"""Pages that wait to be copied, and pages that wait for their like: some 10 MB each. Beyond, they are asked for too."""


class Copies:
    """Args:
    held, written: the cache's map, and that of the guest's own pages, which nobody brings any more.
    digests_of: 16 bytes a page, of pages whose digests are here.
    maybe_read: verified bytes of a held page, or None where it cannot be read or is not right.
    """

    def __init__(
        self,
        held: PageMap,
        written: PageMap | None,
        digests_of: Callable[[PageRange], bytes],
        maybe_read: Callable[[PageRange], Awaitable[bytes | None]],
    ) -> None:
        self.equal = EqualPages()
        self._held = held
        self._written = written
        self._digests_of = digests_of
        self._maybe_read = maybe_read
        self.found: dict[int, int] = {}
        """Missing pages, each with one that is held and likely equal."""
        self._waiting_for: dict[int, set[int]] = {}  # what is on its way: missing pages that are equal to it
        self.waiting = 0
        """Pages that wait for their like."""

    def note_leaf(self, first: int, digests: bytes) -> None:
        """The digests of pages from `first` on have come: which of these are held elsewhere?"""
        if len(self.found) < MAX_COPIES:
            self.found.update(self.equal.candidates(first, digests))

    def note_held(self, pages: PageRange) -> None:
        """Others may be copied from `pages`."""
        self.equal.note(pages, self._digests_of(pages))

    def arrived(self, pages: PageRange) -> None:
        """`pages` are held now; what waited for them can be copied."""
        if not self._waiting_for:
            return
        for page in self._waiting_for.keys() & range(pages.start, pages.end):
            likes = self._waiting_for.pop(page)
            self.waiting -= len(likes)
            self.found.update(dict.fromkeys(likes, page))

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        """The parts of missing `pages` to ask for. The rest is equal to held pages, and is copied, or to pages that
        were let through here, and is copied when those are held."""
        passed: set[int] = set()
        for page, elsewhere in self.equal.claim(pages.start, self._digests_of(pages)):
            if self._is_held(elsewhere):
                if page not in self.found and len(self.found) >= MAX_COPIES:
                    continue
                self.found[page] = elsewhere
            elif self._written is not None and not self._written.all_unset(PageRange(elsewhere, 1)):
                self._note_alone(page)  # nobody guesses the other one any more
                continue
            elif not self._wait_for(elsewhere, page):
                continue
            passed.add(page)
        return [pages] if not passed else runs(page for page in range(pages.start, pages.end) if page not in passed)

    async def some(self) -> list[tuple[PageRange, bytes]]:
        """Pages of `found`, each with its bytes; what turned out not to be equal is asked for from here on."""
        copies: list[tuple[PageRange, bytes]] = []
        for count in range(1, min(len(self.found), COPIES_A_WRITE) + 1):
            if not self.found:  # another call was faster
                break
            page, elsewhere = self.found.popitem()
            here = PageRange(page, 1)
            if self._held.states(here)[0] == UNSET:
                maybe_data = await self._maybe_equal_page(PageRange(elsewhere, 1), self._digests_of(here))
                if maybe_data is not None:
                    copies.append((here, maybe_data))
                else:
                    self._note_alone(page)
            if count % COPIES_A_TURN == 0:
                await trio.lowlevel.checkpoint()
        return copies

    async def _maybe_equal_page(self, held: PageRange, digest: bytes) -> bytes | None:
        """Verified bytes of one page, if it is held and has just that digest."""
        if not self._is_held(held.start) or self._digests_of(held) != digest:
            return None
        return await self._maybe_read(held)

    def _is_held(self, page: int) -> bool:
        return self._held.states(PageRange(page, 1))[0] == SET

    def _wait_for(self, elsewhere: int, page: int) -> bool:
        """Whether there is room to note that `page` is to be copied from `elsewhere` once that is held."""
        if page in self._waiting_for.get(elsewhere, ()):
            return True
        if self.waiting >= MAX_COPIES:
            return False
        self._waiting_for.setdefault(elsewhere, set()).add(page)
        self.waiting += 1
        return True

    def _note_alone(self, page: int) -> None:
        """It cannot be copied from the page that was remembered for it: from here on it is asked for."""
        self.note_held(PageRange(page, 1))
