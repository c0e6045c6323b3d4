"""Which of the kernel's READs go first where its read-ahead hides the one that somebody waits for.

With MADV_HUGEPAGE, as QEMU has it, one touch makes the kernel send 16 READs of 128 KiB, and one of them has the touched
page. Over a link that carries one in a millisecond, a guest waits for those that are before it. Where the touched page
is known (`faultaddresses`) its READ goes at once, and the others are put aside: few are out at a time, so that what is
touched next does not wait for all of them either. Each that ends lets one go, what somebody waits for by then, or what
lies nearest behind his touch.

Where no touch is known, or nobody waits for it any more, READs go as they come. Pure; all calls on trio's thread. See
record 0035.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol

from lazymem.pages import PAGE_SHIFT, PAGE_SIZE

MOST_OUT = 5
"""While others are put aside: with less the link has nothing to carry while an answer is looked at, and each more is in
the way of what is touched next."""

BLOCK_PAGES = 512
"""A touch under a huge-page hint has the kernel read the huge page around it, and up to one more."""

MOST_THREADS = 256
"""Whose last touch that a READ came for is remembered. Of more all are forgotten, which at worst costs some order."""


class Touch(NamedTuple):
    """What a thread touched last. `stamp`: another number for each of its touches."""

    thread: int
    page: int
    stamp: int


class Touched(Protocol):
    """Who knows what threads touched."""

    def maybe_latest(self, thread: int) -> Touch | None:
        """None: it is not known, or was nothing of the RAM."""
        ...

    def latest(self) -> Iterable[Touch]:
        """Of every thread of which it is known."""
        ...


class Aside(NamedTuple):
    """A READ that is put aside. `offset` and `size` in bytes."""

    unique: int
    thread: int
    offset: int
    size: int

    def has(self, page: int) -> bool:
        return self.offset <= page << PAGE_SHIFT < self.offset + self.size


class ReadOrder:
    """`at_hand(offset, size)`: whether a READ of these bytes needs no fetch. `pays`: whether to put any aside."""

    def __init__(self, touched: Touched, at_hand: Callable[[int, int], bool], pays: Callable[[], bool]) -> None:
        self._touched = touched
        self._at_hand = at_hand
        self._pays = pays
        self.aside: dict[int, Aside] = {}
        """By unique number, in the order in which they came. Others only look at it."""
        self._asked: dict[int, tuple[int, int]] = {}  # by thread: the stamp of a touch, and the READ that had its page

    def puts_aside(self, unique: int, thread: int, offset: int, size: int, open_reads: Collection[int]) -> bool:
        """Whether this READ, of more than a page, is put aside; `maybe_due` gives it later. False: it is to be started.

        `open_reads`: the numbers of those that are not answered, this one and what is put aside among them.
        """
        if not self._pays():
            return False
        maybe_touch = self._touched.maybe_latest(thread)
        if maybe_touch is None or not self._waits(maybe_touch, offset >> PAGE_SHIFT, open_reads):
            return False
        read = Aside(unique, thread, offset, size)
        if self._is_waited_for(read, self._touched.latest()) or self._at_hand(offset, size):
            return False
        self.aside[unique] = read
        return True

    def maybe_due(self, open_reads: Collection[int], *, everything: bool = False) -> Aside | None:
        """A READ to be started now, which is no longer put aside then. To be asked until None comes: when one has
        ended, and when no more come for now. `everything`: however many are out."""
        for unique in [unique for unique in self.aside if unique not in open_reads]:
            del self.aside[unique]  # whoever waited for it was killed
        if not self.aside:
            return None
        touches = {touch.thread: touch for touch in self._touched.latest()}
        waiting = [touch for touch in touches.values() if not self._is_here(touch.page)]
        for read in self.aside.values():
            if self._is_waited_for(read, waiting):
                return self.aside.pop(read.unique)
        if len(open_reads) - len(self.aside) >= MOST_OUT and not everything and self._pays():
            return None
        nearest = min(self.aside.values(), key=lambda read: _distance(read, touches.get(read.thread)))
        return self.aside.pop(nearest.unique)

    def give_up(self, uniques: Collection[int], open_reads: Collection[int]) -> list[Aside]:
        """Those of these that are still put aside: they no longer are, and are to be started."""
        found = [self.aside.pop(unique) for unique in uniques if unique in self.aside]
        return [read for read in found if read.unique in open_reads]

    def _waits(self, touch: Touch, page: int, open_reads: Collection[int]) -> bool:
        """Whether the thread that has the kernel read from `page` on waits for the page that it touched last."""
        block = touch.page - touch.page % BLOCK_PAGES
        if not block <= page < block + 2 * BLOCK_PAGES:
            return False  # nothing that the kernel reads for that touch
        maybe_asked = self._asked.get(touch.thread)
        if maybe_asked is not None and maybe_asked[0] == touch.stamp and maybe_asked[1] not in open_reads:
            return False
        return not self._is_here(touch.page)

    def _is_waited_for(self, read: Aside, touches: Iterable[Touch]) -> bool:
        found = False
        for touch in touches:
            if read.has(touch.page) and not self._is_here(touch.page):
                self._note(touch, read.unique)
                found = True
        return found

    def _is_here(self, page: int) -> bool:
        return self._at_hand(page << PAGE_SHIFT, PAGE_SIZE)

    def _note(self, touch: Touch, unique: int) -> None:
        if len(self._asked) >= MOST_THREADS and touch.thread not in self._asked:
            self._asked.clear()
        self._asked[touch.thread] = touch.stamp, unique


def _distance(read: Aside, maybe_touch: Touch | None) -> int:
    """In pages, from the touch onwards; backwards they count twice."""
    if maybe_touch is None:
        return 0
    ahead = (read.offset >> PAGE_SHIFT) - maybe_touch.page
    return ahead if ahead >= 0 else -2 * ahead
