"""A page fault's own way through the fetch room: one run of pages that nobody has asked for, one frame out, one in.

The barest is the direct way: while somebody looks at the connection without giving up the processor (`watch`), a fault
is sent, and its answer given, before it is entered anywhere, since nothing else runs meanwhile. What is still to be
done then is done while the next fault's answer is on its way. Whoever is to do anything else first calls `settle`: from
there on it is a want in the in-flight table like any other, so whoever else needs its pages joins it. But its first
reader has no `Demand` and its request no `Flight`: those are made only where the short way ends (a refused answer,
several frames).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

from lazymem.digests import page_digests
from lazymem.errors import LazymemError
from lazymem.fetch.inflight import InFlightTable, State, Want
from lazymem.fetch.keeper import Keeper
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.plan import Budget
from lazymem.fetch.prefetch import Prefetcher
from lazymem.fetch.sink import Sink
from lazymem.fetch.starter import FetchStarter
from lazymem.fetch.stats import WaitHistogram
from lazymem.pages import Fetched, PageRange, PageRun

DIRECT_PAGES = 8
"""Larger answers seldom come in one piece."""

Here = Callable[[bytes | memoryview], None]
Answered = Callable[[list[PageRun] | LazymemError], None]
Entered = Callable[[], Answered]


class Demands:
    """What is counted of them, on whichever way. `flights`: requests that are out."""

    __slots__ = ("best_answer_seconds", "faults", "flights", "pages", "waits")

    def __init__(self) -> None:
        self.flights = self.faults = self.pages = 0
        self.waits = WaitHistogram()
        self.best_answer_seconds = math.inf
        """Of guesses too: a round trip, and the only one measured while nothing pauses."""

    def note(self, pages: int, seconds: float) -> None:
        """An answer came."""
        self.pages += pages
        if seconds < self.best_answer_seconds:
            self.best_answer_seconds = seconds


class Fault(Want):
    """`answered` is called once, with the pages or the error. `started_at`: seconds, of `perf_counter`."""

    __slots__ = ("answered", "started_at")

    def __init__(self, pages: PageRange, started_at: float, answered: Answered) -> None:
        self.pages = pages
        self.background = False
        self.state = State.SENT
        self.attempts = 0
        self.demands = []
        self.error = None
        self.runs = ()
        self.answered = answered
        self.started_at = started_at


class _Direct(NamedTuple):
    """Sent, and in no table. `digests`: 16 bytes a page, what the answer must have."""

    pages: PageRange
    digests: bytes
    started_at: float
    here: Here
    entered: Entered


class FaultWay:
    """`on_otherwise`: gets a fault whose answer is not one good frame. `on_room`: called after an answer. `on_sent`:
    after a fault was sent that will be waited for."""

    def __init__(
        self,
        starter: FetchStarter,
        sink: Sink,
        table: InFlightTable,
        keeper: Keeper,
        demands: Demands,
        budget: Budget,
        last_demand: LastDemand,
        maybe_prefetcher: Prefetcher | None,
        on_otherwise: Callable[[Fault, Fetched | LazymemError], None],
        on_room: Callable[[], None],
        on_sent: Callable[[], None],
    ) -> None:
        self._starter = starter
        self._sink = sink
        self._table = table
        self._keeper = keeper
        self._demands = demands
        self._budget = budget
        self._last_demand = last_demand
        self._maybe_prefetcher = maybe_prefetcher
        self._on_otherwise = on_otherwise
        self._on_room = on_room
        self._on_sent = on_sent
        self._watched = False
        self._maybe_direct: _Direct | None = None
        self._maybe_given: tuple[_Direct, float, bytes | memoryview] | None = None  # its reader has it: when, and what

    def start(self, pages: PageRange, here: Here, entered: Entered) -> bool:
        """As `PageDemand.start`: for pages that nobody has asked for, when nothing is in the way of asking now."""
        table, demands, budget = self._table, self._demands, self._budget
        if not self._watched or self._maybe_direct is not None:
            self.settle()
        if table.has_waiting or not table.is_free(pages) or self._was_just_given(pages):
            return False
        if demands.flights >= budget.max_demand_requests or table.unkept_pages >= budget.max_unkept_pages:
            return False
        started_at = perf_counter()
        demands.faults += 1
        demands.flights += 1
        if self._watched and pages.count <= DIRECT_PAGES:
            maybe_digests = self._sink.maybe_digests(pages)
            if maybe_digests is not None and self._starter.ask(pages):
                self._maybe_direct = _Direct(pages, maybe_digests, started_at, here, entered)
                self._keep_given()
                return True
        self._keep_given()
        fault = Fault(pages, started_at, entered())
        table.enter_sent(fault)
        self._last_demand.seconds = started_at
        self._starter.start_lone(
            pages,
            self._sink.missing_leaves(pages),
            lambda maybe_data: self._here(fault, maybe_data),
            lambda answer: self._on_otherwise(fault, answer),
        )
        self._note_fault(pages)
        self._on_sent()
        return True

    # ---- the direct way

    def watch(self) -> None:
        """From now until `unwatch` whoever calls does not give up the processor, and looks at the connection."""
        self._watched = True

    def unwatch(self) -> None:
        """Others run from now on."""
        self._watched = False
        self.settle()

    def settle(self) -> None:
        """A fault that is on the direct way leaves it: something else is done before its answer is here."""
        if self._enter():
            self._on_sent()

    def _enter(self) -> bool:
        """Whether there was one."""
        self._keep_given()
        direct = self._maybe_direct
        if direct is None:
            return False
        self._maybe_direct = None
        fault = Fault(direct.pages, direct.started_at, direct.entered())
        self._table.enter_sent(fault)
        self._last_demand.seconds = direct.started_at
        self._starter.enter_asked(
            lambda maybe_data: self._here(fault, maybe_data),
            lambda answer: self._on_otherwise(fault, answer),
        )
        self._note_fault(direct.pages)
        return True

    def receive_nowait(self) -> bool:
        """Act on what came on the demand connection; whether there was something."""
        direct = self._maybe_direct
        if direct is None:
            self._keep_given()
            return self._starter.receive_nowait()
        maybe_data = self._starter.maybe_asked_answer()
        if maybe_data is None or page_digests(maybe_data) != direct.digests:
            self._enter()
            came = self._starter.receive_nowait()  # before what nobody waits for
            self._on_sent()
            return came
        self._maybe_direct = None
        try:
            direct.here(maybe_data)
        finally:
            self._maybe_given = direct, perf_counter(), maybe_data
            self._starter.end_asked()
        return True

    def _was_just_given(self, pages: PageRange) -> bool:
        """Whether any of `pages` is here, and entered only now."""
        if self._maybe_given is None:
            return False
        given = self._maybe_given[0].pages
        if given.start >= pages.start + pages.count or pages.start >= given.start + given.count:
            return False
        self._keep_given()
        return True

    def _keep_given(self) -> None:
        """What was left undone when the last direct answer was given."""
        if self._maybe_given is None:
            return
        direct, given_at, data = self._maybe_given
        self._maybe_given = None
        pages = direct.pages
        self._sink.given(pages)
        fault = Fault(pages, direct.started_at, _nobody)
        self._table.enter_sent(fault)
        self._last_demand.seconds = direct.started_at
        self._keep(fault, given_at - direct.started_at, (PageRun(pages, data),))
        self._note_fault(pages)

    # ---- entered

    def _note_fault(self, pages: PageRange) -> None:
        if self._maybe_prefetcher is not None:
            self._maybe_prefetcher.faulted(pages)
            self._last_demand.is_near = self._maybe_prefetcher.is_near

    def _here(self, fault: Fault, maybe_data: bytes | None) -> None:
        """The whole answer came in one frame; None: zeros. The reader gets it before anything else is done."""
        run = PageRun(fault.pages, maybe_data)
        fetched = Fetched((run,))
        try:
            self._sink.accept(fetched)
        except LazymemError as error:
            self._on_otherwise(fault, error)
            return
        fault.answered([run])
        self._keep(fault, perf_counter() - fault.started_at, fetched.runs)

    def _keep(self, fault: Fault, elapsed: float, runs: Sequence[PageRun]) -> None:
        demands = self._demands
        demands.waits.add(elapsed)
        demands.note(fault.pages.count, elapsed)
        demands.flights -= 1
        self._table.arrived(fault, runs)
        self._keeper.put((fault,), Fetched(tuple(runs)), demanded=True)
        if self._table.has_waiting:
            self._on_room()


def _nobody(answer: list[PageRun] | LazymemError) -> None:
    raise AssertionError("its reader has the pages")
