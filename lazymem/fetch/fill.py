"""Guesses alone, where nobody demands: what a strategy names is fetched and kept, as fast as the link brings it.

Beside the scheduler's, this way is short: no reader waits for a page of it, so there is no table of who waits for what.
One byte a page says what is on its way; answers are verified as they come and kept in order of arrival.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

import trio

from lazymem.digests import LEAF_PAGES
from lazymem.errors import LazymemError
from lazymem.fetch.coming import UNNUMBERED, Coming
from lazymem.fetch.guesses import MAX_GUESS_RANGES, MAX_LOOKED_AT_PAGES
from lazymem.fetch.keeper import joined
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.prefetch import Prepager
from lazymem.fetch.rightofway import TRICKLE_PAGES, TRICKLE_SECONDS, RightOfWay
from lazymem.fetch.scheduler import DEMANDED_SECONDS
from lazymem.fetch.sink import Sink
from lazymem.fetch.starter import FetchStarter
from lazymem.fetch.window import BEHIND_DEMANDS, BESIDE_DEMANDS, BackgroundWindow
from lazymem.pages import Fetched, PageRange

log = logging.getLogger(__name__)

KEPT_AT_ONCE_PAGES = 4096
"""16 MiB in one call of the sink: a thread's way there and back is paid once for them, which takes as long as the
writing where all processors are busy."""

WAITED_FOR_PAGES = 1024
"""So many at once while somebody waits for pages that are on their way: he hears of them the sooner."""

KEEPERS = 2
"""So many such calls at a time: while a thread writes what one brought, what the next one brings is got ready."""

WHOLE_LEAVES_FROM_PAGES = LEAF_PAGES // 2
"""Of a request: where it is so large anyway, its last leaf is asked for to its end, as far as the window has room."""

LOOK_AGAIN_SECONDS = 0.001
"""At least so long after demands were given way to."""

MAX_UNKEPT_PAGES = 8192
"""32 MiB that came and are not in the cache yet: a disk that is slower than the link slows the link."""


class Fill:
    """Fetches what `guesses` names from `source` into `sink`. All methods belong to trio's thread."""

    def __init__(
        self,
        source: FetchStarter,
        sink: Sink,
        pages: int,
        guesses: Prepager,
        last_demand: LastDemand,
        maybe_coming: Coming | None = None,
        tell_kept: Callable[[], None] = lambda: None,
        round_trip_seconds: float = math.inf,
        assumed_bytes_per_second: float = 0.0,
    ) -> None:
        """`pages`: of the whole RAM. `maybe_coming`: shared with who demands. `tell_kept`: called when pages were kept
        and somebody waits for such. `round_trip_seconds`: the best one that was seen by others.
        `assumed_bytes_per_second`: as `BackgroundWindow`'s."""
        self._source = source
        self._sink = sink
        self._guesses = guesses
        self._last_demand = last_demand
        self._window = BackgroundWindow(assumed_bytes_per_second)
        self._best_answer = round_trip_seconds
        self._coming = maybe_coming or Coming(pages)
        self._tell_kept = tell_kept
        self._arrived: deque[tuple[int, Sequence[PageRange], Fetched]] = deque()
        self._unkept_pages = 0
        self._copying = False
        self._something = trio.Event()
        self._to_look_at = trio.Event()
        self._to_copy = trio.Event()
        self._to_go_on = trio.Event()
        self._right_of_way = RightOfWay()
        self._looked_enough = False
        self.has_left_out = False
        """Pages were missing and not asked for, since who demands had them on their way."""
        self.in_flight_pages = 0
        self.brought_pages = 0
        self.rejected_pages = 0

    @property
    def is_busy(self) -> bool:
        """Whether pages are on their way, or came and are not kept yet, or are to be copied from equal ones."""
        return self.in_flight_pages > 0 or self._unkept_pages > 0 or self._copying or self._sink.has_copies

    @property
    def bytes_per_second(self) -> float:
        """What lately came over the wire; 0 before anything did."""
        return self._window.rate_bytes_per_second

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            StoreError: the disk refused; in an exception group.
        """
        async with trio.open_nursery() as nursery:
            for _ in range(KEEPERS):
                nursery.start_soon(self._keep_all)
            nursery.start_soon(self._copy_all)
            nursery.start_soon(self._go_on)
            self._send_more()
            await self._look_on()

    async def _look_on(self) -> None:
        """Others get a turn after each look at so many pages that none of them was worth asking for."""
        while True:
            await self._to_look_at.wait()
            await trio.lowlevel.checkpoint()
            self._to_look_at = trio.Event()
            self._send_more()

    async def _go_on(self) -> None:
        """Look again when demands have had the link to themselves for long enough, or a trickle passes."""
        while True:
            await self._to_go_on.wait()
            left = self._right_of_way.left_seconds(perf_counter(), self._last_demand.seconds, self.round_trip_seconds)
            await trio.sleep(max(LOOK_AGAIN_SECONDS, min(left, TRICKLE_SECONDS)))
            self._to_go_on = trio.Event()
            self._send_more()

    async def _keep_all(self) -> None:
        while True:
            await self._something.wait()
            while self._arrived:
                await self._keep(self._next_batch())
                self._send_more()
            if self._something.is_set():  # or another keeper was first
                self._something = trio.Event()

    async def _copy_all(self) -> None:
        """What is equal to held pages is held without the source; the link is busy with others meanwhile."""
        while True:
            await self._to_copy.wait()
            self._to_copy = trio.Event()
            if self._sink.has_copies:
                await self._copy_equal()
                self._guesses.brought(PageRange(0, 1))  # of what does not matter: a sweep may be worth it
                self._send_more()

    def look_at_left_out(self) -> None:
        """Of the pages that were left to who demands, some may not have come: with nothing else to do, guess again."""
        if self.has_left_out and not self.is_busy:
            self.has_left_out = False
            self._guesses.brought(PageRange(0, 1))  # of what does not matter: a sweep is worth it again
            self._send_more()

    # ---- out

    def _send_more(self) -> None:
        """Send guesses while the window has room. At the moment when an answer made that room: a link that waits for a
        disk first stands idle."""
        while self._unkept_pages < MAX_UNKEPT_PAGES:
            piece = self._window.piece_pages
            room = self._window.pages - self.in_flight_pages
            if room < piece:
                break
            if not self._may_send():
                self._to_go_on.set()
                break
            gives_way = self._gives_way()
            ranges = self._gather(min(room, max(piece, TRICKLE_PAGES)) if gives_way else piece, room)
            if ranges:
                self._send(ranges, gives_way=gives_way)
                continue
            if self._looked_enough:
                self._to_look_at.set()
            break
        if self._sink.has_copies:
            self._to_copy.set()

    @property
    def round_trip_seconds(self) -> float:
        """The best one of the link; infinite before any."""
        return min(self._best_answer, self._source.best_round_trip_seconds)

    def _gives_way(self) -> bool:
        """To demands that are near each other: else a sweep may bring the next one, and a recorded set is what the
        guest is about to demand."""
        if not self._last_demand.is_near or self._guesses.set_is_coming:
            return False
        return self._right_of_way.left_seconds(perf_counter(), self._last_demand.seconds, self.round_trip_seconds) > 0

    def _may_send(self) -> bool:
        if not self._gives_way():
            return True
        out, demanded_at = self.in_flight_pages > 0, self._last_demand.seconds
        return self._right_of_way.passes(perf_counter(), demanded_at, self.round_trip_seconds, requests_out=out)

    def _gather(self, pages: int, most: int) -> list[PageRange]:
        """Ranges of so many pages or, for the sake of whole leaves, of `most`; ascending. Empty: nothing to ask for
        now, or enough was looked at."""
        found: list[PageRange] = []
        room, looked_at = pages, 0
        least = LEAF_PAGES if pages >= WHOLE_LEAVES_FROM_PAGES else 0
        self._looked_enough = False
        while room > 0 and len(found) < MAX_GUESS_RANGES:
            if looked_at > MAX_LOOKED_AT_PAGES:
                self._looked_enough = True
                break
            longest = min(max(room, least), room + most - pages)
            if found and longest < least:
                break  # half of a leaf cannot be verified at once; the next request has it whole
            guess = self._guesses.next_range(longest)
            if guess is None:
                break
            looked_at += guess.count
            self.has_left_out |= self._coming.is_demanded(guess)
            for free in self._coming.free(guess):
                for part in self._sink.worth_fetching(free):
                    self._coming.guess(UNNUMBERED, part)
                    found.append(part)
                    room -= part.count
        found.sort()
        return found

    def _send(self, ranges: list[PageRange], *, gives_way: bool) -> None:
        pages = sum([part.count for part in ranges])
        self.in_flight_pages += pages
        sent_at, bytes_before = perf_counter(), self._source.wire_received_bytes
        number = self._coming.begin(sent_at)
        for part in ranges:
            self._coming.guess(number, part)
        brought_before = self.brought_pages

        def on_done(answer: Fetched | LazymemError) -> None:
            self.in_flight_pages -= pages
            if isinstance(answer, LazymemError):
                self._rejected(number, ranges, answer)
                return
            self.brought_pages += pages
            if not gives_way:  # how slow a trickle is says nothing of the link
                self._note(perf_counter() - sent_at, bytes_before, brought_before)
            try:
                self._sink.accept(answer)
            except LazymemError as error:
                self._rejected(number, ranges, error)
                return
            self._unkept_pages += pages
            self._arrived.append((number, ranges, answer))
            self._something.set()
            self._send_more()

        want_leaves = any(self._sink.missing_leaves(part) for part in ranges)
        self._source.start_fetch(ranges, want_leaves=want_leaves, background=True, on_done=on_done)

    def _note(self, elapsed: float, bytes_before: int, brought_before: int) -> None:
        self._best_answer = min(self._best_answer, elapsed)
        # A recorded set is what the guest is about to demand.
        self._window.when_demanded = BESIDE_DEMANDS if self._guesses.set_is_coming else BEHIND_DEMANDS
        self._window.note(
            self._source.wire_received_bytes - bytes_before,
            self.brought_pages - brought_before,
            elapsed,
            self.round_trip_seconds,
            trio.current_time(),
            perf_counter() - self._last_demand.seconds < DEMANDED_SECONDS,
        )
        self._coming.tell_rate(self._window.rate_bytes_per_second)

    # ---- in

    def _rejected(self, number: int, ranges: Sequence[PageRange], error: LazymemError) -> None:
        """Wrong bytes, or a refusal for good: the pages stay missing, and a later sweep may ask again."""
        log.warning("fetch of %d ranges from page %d on: %s", len(ranges), ranges[0].start, error)
        self.rejected_pages += sum([part.count for part in ranges])
        self._coming.end(number, ranges)
        self._to_look_at.set()  # not at once: a request that fails as it is sent would send the next one from here

    def _next_batch(self) -> list[tuple[int, Sequence[PageRange], Fetched]]:
        batch: list[tuple[int, Sequence[PageRange], Fetched]] = []
        pages = 0
        most = WAITED_FOR_PAGES if self._coming.is_waited_for else KEPT_AT_ONCE_PAGES
        while self._arrived and pages < most:
            batch.append(self._arrived.popleft())
            pages += sum([part.count for part in batch[-1][1]])
        return batch

    async def _keep(self, batch: Sequence[tuple[int, Sequence[PageRange], Fetched]]) -> None:
        await self._sink.keep(joined([fetched for _, _, fetched in batch]))
        now = perf_counter()
        for number, ranges, _ in batch:
            self._unkept_pages -= sum([part.count for part in ranges])
            self._coming.end(number, ranges, now)
            self._guesses.brought(ranges[0])
        if self._coming.is_waited_for:
            self._tell_kept()

    async def _copy_equal(self) -> None:
        self._copying = True
        try:
            await self._sink.copy_equal()
        finally:
            self._copying = False
