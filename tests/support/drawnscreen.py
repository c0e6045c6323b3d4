"""A screen's memory as time goes by, without a guest: pages that are drawn one after the other, then a rest."""

from __future__ import annotations

from lazymem.pages import PAGE_SIZE

LOOK_SECONDS = 0.0004


class DrawnScreen:
    """`pages` pages, of which the first `still` never change. Each reading takes 0.4 ms of the screen's own clock."""

    def __init__(self, pages: int, *, draws: float, rests: float, still: int = 0) -> None:
        self.now = 100.0
        self.readings = 0
        self._pages, self._still = pages, still
        self._draws, self._rests = draws, rests

    def clock(self) -> float:
        return self.now

    def read(self, offset: int, size: int) -> bytes:
        self.now += LOOK_SECONDS
        self.readings += 1
        return b"".join(self._page(number) for number in range(offset // PAGE_SIZE, (offset + size) // PAGE_SIZE))

    def _page(self, number: int) -> bytes:
        """Drawn after its share of the drawing, over and over."""
        if number < self._still:
            return bytes(PAGE_SIZE)
        drawn_after = self._draws * (number - self._still) / (self._pages - self._still)
        times = int((self.now - drawn_after) // (self._draws + self._rests))
        return times.to_bytes(8, "big") * (PAGE_SIZE // 8)

    def sent(self) -> dict[int, bytes]:
        """As it went in a first pass."""
        return {number * PAGE_SIZE: self._page(number) for number in range(self._pages)}

    def seconds_to_next(self) -> float:
        """Until it is drawn again."""
        cycle = self._draws + self._rests
        return cycle - self.now % cycle
