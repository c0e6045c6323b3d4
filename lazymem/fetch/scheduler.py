"""Demand and guesses put together: fits `store.source.PageDemand`, given a source and a sink.

Tasks: readers in `demand`; the source's reader task, which calls `_answered`; the keeper. All shared state is the
in-flight table and `_flights`, and every change of them happens without an await in between.

What cancellation leaves behind: a cancelled reader is out of the table at once. A want that nobody waits for any more
is dropped if it was not sent; if all wants of a request are orphans, the request is cancelled at the source.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import trio

from lazymem.errors import DeadlineError, LazymemError
from lazymem.fetch.coming import Coming
from lazymem.fetch.faultway import Demands, Entered, Fault, FaultWay, Here
from lazymem.fetch.flight import Flight, check_cover, pieces
from lazymem.fetch.guesses import Asked, GuessQueue
from lazymem.fetch.inflight import Demand, InFlightTable, State, Want, cut_runs
from lazymem.fetch.keeper import Keeper
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.others import Others
from lazymem.fetch.overdue import OverdueGuesses
from lazymem.fetch.plan import Budget, Load, background_allowance, plan_demand
from lazymem.fetch.prefetch import Prefetcher
from lazymem.fetch.sink import Sink
from lazymem.fetch.starter import Source, starter_of
from lazymem.fetch.stats import FetchStatistics
from lazymem.fetch.window import BackgroundWindow
from lazymem.pages import Fetched, PageRange, PageRun

logger = logging.getLogger(__name__)

INLINE_VERIFY_PAGES = 64
"""Verified at once in a quarter of a millisecond; of larger answers others get a turn after each so many pages."""

DEMANDED_SECONDS = 0.25
"""After a demand the next one is likely for so long, and guesses leave it more room."""

KEEP_AGAIN_SECONDS = 2.0
MOST_KEEP_AGAIN_SECONDS = 30.0
"""Pauses of the guesses whose pages could not be kept: each try costs the link a window of them."""

RETRY_BASE_SECONDS = 0.05
RETRY_CAP_SECONDS = 10.0
"""An answer that is no good is asked for again as long as somebody waits for it: memory and wires do flip bits, and a
server's people mend its disk. Once at once, then with growing pauses and at another server. A guest would die of an
error, and can wait."""

FEW_TRIES = 4
TRIES_A_LINE = 30
"""The log has each of the first tries, then one line in five minutes."""


class Scheduler:
    """`source` and `sink` are `store.source.PageSource` and `PageSink`; tasks live in `nursery`.

    `deadline_seconds`: of each demand; None waits for ever. Without a prefetcher only `prefetch` brings guesses.
    `last_demand` and `maybe_coming`: shared with who guesses in another process.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        nursery: trio.Nursery,
        *,
        budget: Budget | None = None,
        deadline_seconds: float | None = None,
        prefetcher: Prefetcher | None = None,
        last_demand: LastDemand | None = None,
        maybe_coming: Coming | None = None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._nursery = nursery
        self._starter = starter_of(source, nursery)
        self._budget = budget or Budget()
        self._deadline = deadline_seconds
        self._table = InFlightTable(maybe_coming)
        self._flights: dict[Want, Flight] = {}
        self._maybe_others: Others | None = None
        if maybe_coming is not None:
            self._maybe_others = Others(
                maybe_coming, self._table, sink, nursery, self.answer_seconds, self._send_demands
            )
        maybe_not_theirs = self._maybe_others.not_theirs if self._maybe_others is not None else None
        self._guesses = GuessQueue(self._table, sink, prefetcher, maybe_not_theirs)
        self._window = BackgroundWindow()
        self._last_demand = last_demand or LastDemand()
        self._demands = Demands()
        self._keeper = Keeper(sink, self._kept)
        self._maybe_not_kept: str | None = None
        self._is_paused = False
        self._pause_seconds = KEEP_AGAIN_SECONDS
        self._rng = random.Random()
        self._copying = False
        self._looking_on = False
        self._failures = self._background_pages = 0
        self._faults = FaultWay(
            self._starter,
            sink,
            self._table,
            self._keeper,
            self._demands,
            self._budget,
            self._last_demand,
            prefetcher,
            self._fault_answered,
            self._send_demands,
            self._fill_background,
        )
        self._overdue = OverdueGuesses(self._starter, sink, self.answer_seconds, self._came_early)
        nursery.start_soon(self._overdue.run)
        nursery.start_soon(self._keeper.run)
        self._fill_background()

    # ---- readers

    async def demand(self, pages: PageRange) -> list[PageRun]:
        """As `PageDemand.demand`: verified runs that cover `pages` exactly, in order.

        Raises:
            DeadlineError: the user's deadline passed.
        """
        started_at = perf_counter()
        self._demands.faults += 1
        arrived = trio.Event()
        demand = self._table.demand(pages, arrived.set)
        if demand.open:
            self._promote(demand)
            left = self._maybe_others is not None and self._maybe_others.leave_to_them(demand.wants)
            if self._table.has_waiting:
                self._send_demands()
            if not left:  # or who brings them would bring less, as somebody demands
                self._last_demand.seconds = started_at  # also where its pages are on their way already
            if self._guesses.maybe_prefetcher is not None:
                self._guesses.maybe_prefetcher.faulted(pages)
                self._last_demand.is_near = self._guesses.maybe_prefetcher.is_near
                self._fill_background()
            try:
                await self._wait(arrived, pages)
            finally:
                if demand.open or demand.error is not None:
                    self._leave(demand)
        self._demands.waits.add(perf_counter() - started_at)
        return demand.collect()

    def start(self, pages: PageRange, here: Here, entered: Entered) -> bool:
        """As `PageDemand.start`: for pages that nobody has asked for, when nothing is in the way of asking now."""
        if self._deadline is not None or (self._maybe_others is not None and self._maybe_others.bring(pages)):
            return False
        return self._faults.start(pages, here, entered)

    def _fault_answered(self, fault: Fault, answer: Fetched | LazymemError) -> None:
        """Anything but one good frame: from here on it goes the common way."""

        def settled() -> None:
            self._demands.waits.add(perf_counter() - fault.started_at)
            fault.answered(demand.error or demand.collect())

        demand = self._table.join(fault, settled)
        flight = Flight((fault,), False, self._starter.wire_received_bytes, 0, None)
        flight.sent_at -= perf_counter() - fault.started_at  # not now, or this would be the shortest round trip of all
        self._flights[fault] = flight
        self._answered(flight, answer)

    # ---- the demand connection, for who does not give up the processor meanwhile

    def fileno(self) -> int:
        """Readable when answers to demands came; -1 without a connection."""
        return self._starter.fileno()

    @property
    def best_answer_seconds(self) -> float:
        """The shortest time that an answer took, of demands and guesses; infinite before the first."""
        return self._demands.best_answer_seconds

    def receive_nowait(self) -> bool:
        """Act on what came; whether there was something."""
        return self._faults.receive_nowait()

    def watch(self) -> None:
        """From now until `unwatch` the caller gives up the processor to nobody, looks at `fileno`, and calls `settle`
        before it does anything else than `start` and `receive_nowait`."""
        self._faults.watch()

    def unwatch(self) -> None:
        """Others run from now on."""
        self._faults.unwatch()

    def settle(self) -> None:
        """Something else is done now, though a page that was started is not here."""
        self._faults.settle()

    async def _wait(self, arrived: trio.Event, pages: PageRange) -> None:
        if self._deadline is None:
            await arrived.wait()
            return
        with trio.move_on_after(self._deadline) as scope:
            await arrived.wait()
        if scope.cancelled_caught:
            self._failures += 1
            raise DeadlineError(f"page {pages.start} did not come within {self._deadline:g} s")

    def _promote(self, demand: Demand) -> None:
        sent = [self._flights.get(want) for want in demand.wants if want.state is State.SENT]
        for flight in dict.fromkeys(sent):
            if flight is None or flight.handle is None or (not flight.background and len(flight.wants) == 1):
                continue  # a lone fault's comes as a whole
            flight.handle.promote(demand.pages, partial(self._came_early, flight))
            if flight.background:
                self._overdue.wait_for(flight)

    def _came_early(self, flight: Flight, part: Fetched) -> bool:
        """A frame of an answer that is still coming, a guess or what several readers wait for, with pages that one of
        them need not wait for any longer. The whole answer is judged, and kept, when it is here. False: the frame is
        not what it should be."""
        if not any(want.demands for want in flight.wants if want in self._flights):
            return True
        try:
            self._sink.accept(part)
        except LazymemError as error:
            logger.debug("a part of an answer that came is of no use: %s", error)
            return False
        start, end = part.runs[0].pages.start, part.runs[-1].pages.end
        for want in flight.wants:
            if want.pages.start >= end or want.pages.end <= start:
                continue  # most of many
            if want.state is State.SENT and self._flights.get(want) is flight:
                runs = cut_runs(part.runs, want.pages)
                if runs:
                    self._table.came_early(want, runs)
        return True

    def _leave(self, demand: Demand) -> None:
        for flight in {self._flights[want] for want in self._table.leave(demand) if want in self._flights}:
            if flight.background or any(want.demands or want.runs for want in flight.wants):
                continue  # what somebody was given already is kept, too
            if flight.handle is not None:
                flight.handle.cancel()
            self._land(flight)
            for want in flight.wants:
                self._table.abandon(want)
            self._send_demands()

    # ---- requests out

    def _load(self) -> Load:
        table = self._table
        return Load(self._demands.flights, table.background_in_flight_pages, table.unkept_pages)

    def _send_demands(self) -> None:
        sends = plan_demand(self._table.waiting, self._load(), self._budget)
        for send in sends:  # all of them first: a request that fails at once comes back here
            for want in send.wants:
                self._table.sent(want)
        for send in sends:
            self._send(send.wants, background=False)

    def _send(self, wants: Sequence[Want], background: bool, maybe_asked: Asked | None = None) -> None:
        pages_before = self._demands.pages + self._background_pages
        flight = Flight(wants, background, self._starter.wire_received_bytes, pages_before, maybe_asked)
        for want in wants:
            self._flights[want] = flight
        if not background:
            self._demands.flights += 1
            self._last_demand.seconds = perf_counter()

        def on_done(answer: Fetched | LazymemError) -> None:
            self._answered(flight, answer)

        want_leaves = any(self._sink.missing_leaves(pages) for pages in flight.ranges)
        flight.handle = self._starter.start_fetch(
            flight.ranges, want_leaves=want_leaves, background=background, on_done=on_done
        )
        if not background and len(wants) > 1:
            first, last = flight.ranges[0].start, flight.ranges[-1].end
            flight.handle.promote(PageRange(first, last - first), partial(self._came_early, flight))

    def _land(self, flight: Flight) -> None:
        self._overdue.landed(flight)
        flight.handle = None  # it leads back here by `on_done`: pages would live until the cycle collector comes
        for want in flight.wants:
            del self._flights[want]
        if not flight.background:
            self._demands.flights -= 1

    # ---- answers in

    def _answered(self, flight: Flight, answer: Fetched | LazymemError) -> None:
        """Called by the source. Readers run only after it returns, so behind a demand nothing else is done here."""
        if isinstance(answer, LazymemError):
            self._rejected(flight, answer)
        elif flight.pages <= INLINE_VERIFY_PAGES:
            self._verify(flight, answer)
        else:
            self._nursery.start_soon(self._verify_in_pieces, flight, answer)
            return
        self._go_on(flight)

    def _go_on(self, flight: Flight) -> None:
        if self._table.has_waiting:
            self._send_demands()
        if flight.background:
            self._fill_background()

    def _verify(self, flight: Flight, fetched: Fetched) -> None:
        try:
            check_cover(fetched, flight)
            self._sink.accept(fetched)
        except LazymemError as error:  # wrong bytes, or a disk that does not give the digests
            self._rejected(flight, error)
        else:
            self._arrived(flight, fetched)

    async def _verify_in_pieces(self, flight: Flight, fetched: Fetched) -> None:
        """All pieces or none count; readers that left meanwhile may have taken the flight with them."""
        try:
            check_cover(fetched, flight)
            for piece in pieces(fetched, INLINE_VERIFY_PAGES):
                self._sink.accept(piece)
                await trio.lowlevel.checkpoint()
        except LazymemError as error:
            if flight.wants[0] in self._flights:
                self._rejected(flight, error)
        else:
            if flight.wants[0] in self._flights:
                self._arrived(flight, fetched)
        self._go_on(flight)

    def _arrived(self, flight: Flight, fetched: Fetched) -> None:
        self._land(flight)
        for want in flight.wants:
            self._table.arrived(want, fetched.runs)
        pages = flight.pages
        now = trio.current_time()
        elapsed = now - flight.sent_at
        if flight.background:
            self._demands.note(0, elapsed)
            self._background_pages += pages
            self._window.note(
                self._starter.wire_received_bytes - flight.bytes_before,
                self._demands.pages + self._background_pages - flight.pages_before,
                elapsed,
                self.answer_seconds(),
                now,
                perf_counter() - self._last_demand.seconds < DEMANDED_SECONDS,
            )
        else:
            self._demands.note(pages, elapsed)
        self._keeper.put(flight.wants, fetched, flight.maybe_asked)
        flight.maybe_asked = None

    def _rejected(self, flight: Flight, error: LazymemError) -> None:
        """Wrong bytes, or none: ask again for what a reader waits for, each want by itself; give up on guesses."""
        self._land(flight)
        tries = max(want.attempts for want in flight.wants)
        level = logging.WARNING if tries < FEW_TRIES or tries % TRIES_A_LINE == 0 else logging.DEBUG
        logger.log(level, "fetch of %d pages from page %d on: %s", flight.pages, flight.wants[0].pages.start, error)
        for want in flight.wants:
            if want.demands:
                self._ask_again(want, error)
            else:
                self._table.failed(want, error)
        self._settle(flight.maybe_asked)
        flight.maybe_asked = None

    def _ask_again(self, want: Want, error: LazymemError) -> None:
        if not want.attempts:
            self._table.requeue(want)
            return
        self._starter.doubt(str(error))
        self._table.hold(want)
        self._nursery.start_soon(self._ask_later, want)

    async def _ask_later(self, want: Want) -> None:
        longest = min(RETRY_CAP_SECONDS, RETRY_BASE_SECONDS * 2 ** min(want.attempts, 16))
        await trio.sleep(self._rng.uniform(0, longest))
        self._table.release(want)
        self._send_demands()

    def _kept(self, wants: Sequence[Want], maybe_asked: Asked | None, maybe_error: LazymemError | None) -> None:
        for want in wants:
            self._table.kept(want)
            if self._guesses.maybe_prefetcher is not None and maybe_error is None:
                self._guesses.maybe_prefetcher.brought(want.pages)
        if maybe_error is not None:
            self._stop_guessing(maybe_error)
        else:
            self._note_kept()
        self._settle(maybe_asked)
        if self._table.has_waiting:
            self._send_demands()
        self._fill_background()

    def _settle(self, maybe_asked: Asked | None) -> None:
        if maybe_asked is not None:
            maybe_asked.flights -= 1
            maybe_asked.check()

    def _stop_guessing(self, error: LazymemError) -> None:
        """The cache cannot be written: readers get their pages all the same, but guesses would come again and again.
        They are tried again now and then, since a disk gets room again, and somebody may wait for the last page."""
        if self._is_paused:
            return
        if self._maybe_not_kept is None:
            logger.error(
                "fetched pages cannot be kept, so nothing is brought ahead of the guest until they can: %s", error
            )
        self._maybe_not_kept = str(error)
        self._is_paused = True
        self._guesses.pause()
        self._nursery.start_soon(self._guess_again)

    async def _guess_again(self) -> None:
        await trio.sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, MOST_KEEP_AGAIN_SECONDS)
        self._is_paused = False
        self._guesses.resume()
        self._fill_background()

    def _note_kept(self) -> None:
        if self._maybe_not_kept is not None:
            logger.warning("fetched pages are kept again")
            self._maybe_not_kept = None
            self._pause_seconds = KEEP_AGAIN_SECONDS

    @property
    def maybe_not_kept(self) -> str | None:
        """Why fetched pages cannot be kept, as far as the last try tells."""
        return self._maybe_not_kept

    # ---- guesses

    async def prefetch(self, ranges: Sequence[PageRange]) -> None:
        """Bring what is missing of `ranges`, behind every demand; returns when it is kept, or failed for good.

        Pages that are on their way already are not waited for. A cancelled call takes back what was not sent.
        """
        asked = self._guesses.ask(ranges)
        self._fill_background()
        asked.check()
        try:
            await asked.settled.wait()
        finally:
            asked.left.clear()

    def _fill_background(self) -> None:
        """Send guesses while the plan allows some."""
        if not self._window.knows_link and self._maybe_others is not None:
            self._maybe_others.tell_link(self._window)
        self._start_copies()
        while self._guesses:
            piece = self._window.piece_pages
            allowed = background_allowance(self._table.has_waiting, self._load(), self._budget, self._window.pages)
            if allowed < piece:
                return
            wants, maybe_asked = self._guesses.take(piece)
            self._start_copies()
            if not wants:
                if self._guesses.looked_enough and not self._looking_on:
                    self._looking_on = True
                    self._nursery.start_soon(self._look_on)
                return
            self._send(wants, background=True, maybe_asked=maybe_asked)

    # ---- for who must not be in the way

    @property
    def demands_wait(self) -> bool:
        """Whether a reader waits for pages that are on their way."""
        return self._demands.flights > 0 or self._table.has_waiting

    @property
    def guessing(self) -> bool:
        """Whether there may be something to guess; not any more once fetched pages cannot be kept."""
        return bool(self._guesses)

    def look_for_guesses(self) -> None:
        """The strategy may have something now that it had not when it was last asked."""
        self._fill_background()

    @property
    def fetching(self) -> bool:
        """Whether guesses are on their way."""
        return self._table.background_in_flight_pages > 0

    async def _look_on(self) -> None:
        """One such task at a time: others get a turn after each look, however often guesses are asked for meanwhile."""
        await trio.lowlevel.checkpoint()
        self._looking_on = False
        self._fill_background()

    def _start_copies(self) -> None:
        if self._sink.has_copies and not self._copying:
            self._copying = True
            self._nursery.start_soon(self._copy_equal)

    async def _copy_equal(self) -> None:
        """What is equal to held pages is held without the source."""
        try:
            await self._sink.copy_equal()
        except LazymemError as error:
            self._stop_guessing(error)
        finally:
            self._copying = False
        if self._guesses.maybe_prefetcher is not None:
            self._guesses.maybe_prefetcher.brought(PageRange(0, 1))  # of what does not matter: a sweep may be worth it
        self._fill_background()

    @property
    def background_bytes_per_second(self) -> float:
        """What guesses lately brought over the wire; infinite before any, and where nothing is guessed."""
        return self._window.rate_bytes_per_second or math.inf

    # ---- another process that guesses

    def answer_seconds(self) -> float:
        """The shortest time that an answer, a handshake or a ping took; infinite before any."""
        return min(self._demands.best_answer_seconds, self._starter.best_round_trip_seconds)

    def others_kept(self) -> None:
        """It has kept pages that somebody may wait for."""
        if self._maybe_others is not None:
            self._maybe_others.kept()

    def others_ended(self) -> None:
        """It brings nothing more."""
        if self._maybe_others is not None:
            self._maybe_others.stop()

    # ---- for people

    async def wait_kept(self) -> None:
        """Until every page that arrived is in the sink: before the sink is closed."""
        await self._keeper.wait_idle()

    def statistics(self) -> FetchStatistics:
        table = self._table
        link = getattr(self._source, "statistics", None)
        return FetchStatistics(
            demand_faults=self._demands.faults,
            wait_octaves=self._demands.waits.octaves(),
            wait_p50_seconds=self._demands.waits.quantile(0.5),
            wait_p99_seconds=self._demands.waits.quantile(0.99),
            demand_pages=self._demands.pages,
            background_pages=self._background_pages,
            in_flight_pages=table.in_flight_pages,
            background_in_flight_pages=table.background_in_flight_pages,
            unkept_pages=table.unkept_pages,
            queued_demands=len(table.waiting),
            failures=self._failures,
            prefetching=bool(self._guesses) and table.background_in_flight_pages > 0,
            link=link() if callable(link) else None,
        )
