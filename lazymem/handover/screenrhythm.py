"""When a guest draws its screen, and for how long it rests between: by two of its pages, looked at over and over."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from msgspec import Struct

from lazymem.pages import PAGE_SIZE

_UNCHANGED_SECONDS = 0.06
"""Without a change where one was: it does not draw all the time. A film has 24 pictures a second."""

_READ_BYTES = 1 << 20
"""At a time: for 1 ms the emulator does nothing else that needs its lock."""

Read = Callable[[int, int], bytes]
"""The bytes at an offset of the screen's memory, so many."""


class Rest(Struct, frozen=True):
    """`began`: by the clock. `seconds`: how long the one before it took, or what is left of the time that there is;
    `cycle_seconds`: from one to the next."""

    began: float
    seconds: float
    cycle_seconds: float


class Drawing:
    """Of a screen whose drawing changes the page `first` early and the page `last` late (their offsets)."""

    def __init__(
        self, read: Read, first: int, last: int, end: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`end`: by the clock, in seconds, when nothing is waited for any more."""
        self._read = read
        self._first, self._last = first, last
        self._end = end
        self._clock = clock

    def maybe_rest(self) -> Rest | None:
        """One that begins just now, if there is any to be seen."""
        if (maybe_last := self._maybe_other(self._last, self._page(self._last))) is None:
            return None
        ended = self._clock()
        if self._maybe_other(self._first, self._page(self._first)) is None:
            return None
        seconds = self._clock() - ended
        if self._maybe_other(self._last, maybe_last) is None:
            return None
        now = self._clock()
        return Rest(now, min(seconds, self._end - now), now - ended)

    def _maybe_other(self, offset: int, known: bytes) -> bytes | None:
        """The page when it is another one."""
        until = min(self._end, self._clock() + _UNCHANGED_SECONDS)
        while self._clock() < until:
            if (page := self._page(offset)) != known:
                return page
        return None

    def _page(self, offset: int) -> bytes:
        return self._read(offset, PAGE_SIZE)


def changed_pages(read: Read, sent: Mapping[int, bytes]) -> list[int]:
    """The offsets of those pages of `sent` that have other bytes by now, ascending."""
    changed: list[int] = []
    end = max(sent, default=-PAGE_SIZE) + PAGE_SIZE
    for begin in range(min(sent, default=0), end, _READ_BYTES):
        data = read(begin, min(_READ_BYTES, end - begin))
        places = range(0, len(data), PAGE_SIZE)
        changed += [begin + at for at in places if not data.startswith(sent.get(begin + at, b""), at)]
    return changed


def areas(pages: list[int], gap_pages: int) -> list[tuple[int, int]]:
    """Begins and ends, in bytes, of what these pages cover (their offsets, ascending), gaps of fewer pages included."""
    found: list[tuple[int, int]] = []
    for offset in pages:
        if found and offset - found[-1][1] < gap_pages * PAGE_SIZE:
            found[-1] = found[-1][0], offset + PAGE_SIZE
        else:
            found.append((offset, offset + PAGE_SIZE))
    return found
