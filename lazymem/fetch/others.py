"""Demanded pages that another process of the mount has on its way: waited for where that is faster than asking.

Such a want is in the in-flight table, so whoever else needs its pages joins it, but nothing is sent for it before its
time is up. All methods belong to trio's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter

import trio

from lazymem.fetch.coming import Coming
from lazymem.fetch.inflight import InFlightTable, State, Want
from lazymem.fetch.rightofway import SHORTEST_ROUND_TRIP_SECONDS
from lazymem.fetch.sink import Sink
from lazymem.fetch.window import SLOW_SECONDS, BackgroundWindow
from lazymem.pages import PageRange, PageRun


class Others:
    """`answer_seconds`: the shortest time that an answer took; infinite before any. `on_late`: called when wants are to
    be asked for after all."""

    def __init__(
        self,
        coming: Coming,
        table: InFlightTable,
        sink: Sink,
        nursery: trio.Nursery,
        answer_seconds: Callable[[], float],
        on_late: Callable[[], None],
    ) -> None:
        self._coming = coming
        self._table = table
        self._sink = sink
        self._nursery = nursery
        self._answer_seconds = answer_seconds
        self._on_late = on_late
        self._waits: dict[Want, trio.Event] = {}
        self._over = False
        self.waited_pages = 0
        """That came so."""

    def tell_link(self, window: BackgroundWindow) -> None:
        """What they know of a slow link, if they do. Over a fast one a window is right after some milliseconds."""
        rate, round_trip_seconds = self._coming.bytes_per_second, self._answer_seconds()
        if 0 < rate < math.inf and SLOW_SECONDS <= round_trip_seconds < math.inf:
            window.suppose(rate, round_trip_seconds)

    def bring(self, pages: PageRange) -> bool:
        """Whether all of `pages` will be here before an answer to a demand of now."""
        return self._coming.is_guessed(pages.start) and self._maybe_until(pages) is not None

    def _maybe_until(self, pages: PageRange) -> float | None:
        """Within a host two processes that tell each other of a page take as long as to ask."""
        if self._over:
            return None
        answer_seconds = self._answer_seconds()
        if answer_seconds < SHORTEST_ROUND_TRIP_SECONDS:
            return None
        return self._coming.maybe_wait(pages, perf_counter(), answer_seconds)

    def leave_to_them(self, wants: Sequence[Want]) -> bool:
        """Withhold those of `wants` that need not be asked for, if nothing was sent for them before. Whether that is
        all of them."""
        for want in wants:
            if want.state is State.WAITING and not want.attempts and not want.is_late and want not in self._waits:
                maybe_until = self._maybe_until(want.pages)
                if maybe_until is not None:
                    self._table.withhold(want)
                    self._waits[want] = trio.Event()
                    self._coming.note_waiting(len(self._waits))
                    self._nursery.start_soon(self._wait, want, maybe_until)
        return all(want in self._waits for want in wants)

    async def _wait(self, want: Want, until: float) -> None:
        """Until its pages are held, nobody waits for them any more, or they are late."""
        try:
            with trio.move_on_after(max(0.0, until - perf_counter())):
                while not self._over and not self._take(want):
                    event = self._waits[want] = trio.Event()
                    await event.wait()
        finally:
            del self._waits[want]
            self._coming.note_waiting(len(self._waits))
        if want.state is State.WAITING:
            want.is_late = True  # whoever joins it does not wait for them again
            self._table.release(want)
            self._on_late()

    def _take(self, want: Want) -> bool:
        """Whether it needs no more waiting."""
        if want.state is not State.WAITING:
            return True
        maybe_data = self._sink.maybe_read_held_nowait(want.pages)
        if maybe_data is None:
            return False
        self.waited_pages += want.pages.count
        self._table.brought_by_others(want, [PageRun(want.pages, maybe_data)])
        return True

    def kept(self) -> None:
        """The other process has kept pages."""
        for event in self._waits.values():
            event.set()

    def stop(self) -> None:
        """There is no other process any more."""
        self._over = True
        self.kept()

    def not_theirs(self, pages: PageRange) -> list[PageRange]:
        """The parts of `pages` that they do not bring sooner than we could."""
        if self._over or self._answer_seconds() < SHORTEST_ROUND_TRIP_SECONDS:
            return [pages]
        return self._coming.not_guessed(pages)
