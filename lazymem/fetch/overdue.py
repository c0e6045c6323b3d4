"""Guesses that a reader waits for, and that do not come: what is demanded of them is asked for a second time.

A demand for pages of a guess that is out waits for the guess, which is mostly here sooner than another answer could be.
But what carries guesses can stand still while demands are answered: their connection, which something on the way has
forgotten and whose peer is found dead only seconds later, or a server that keeps guesses back. A guest waits for no
guess longer than this says. What comes so is given to the guess, as a frame of it that came early.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from lazymem.errors import LazymemError
from lazymem.fetch.flight import Flight
from lazymem.fetch.inflight import State
from lazymem.fetch.sink import Sink
from lazymem.fetch.starter import FetchStarter
from lazymem.pages import Fetched, PageRange, runs

logger = logging.getLogger(__name__)

LEAST_SECONDS = 0.25
"""On a line of 10 Mb/s a guess of 64 pages is on its way for so long, and on a faster one for less."""

ANSWERS = 8.0
"""Or so many times what the quickest answer took, where that is longer."""


class OverdueGuesses:
    """`answer_seconds`: the shortest time that an answer took; infinite before any. `on_early`: takes in what came, and
    says whether that was right."""

    def __init__(
        self,
        starter: FetchStarter,
        sink: Sink,
        answer_seconds: Callable[[], float],
        on_early: Callable[[Flight, Fetched], bool],
    ) -> None:
        self._starter = starter
        self._sink = sink
        self._answer_seconds = answer_seconds
        self._on_early = on_early
        self._since: dict[Flight, float] = {}  # trio's time, ascending
        self._asked: set[Flight] = set()  # again, and no answer is here yet
        self._useless: set[Flight] = set()  # was the last answer for them
        self._something = trio.Event()

    def wait_for(self, flight: Flight) -> None:
        """A reader waits for pages of this guess, from now on if not before."""
        if flight not in self._since and flight not in self._asked:
            self._since[flight] = trio.current_time()
            self._something.set()

    def landed(self, flight: Flight) -> None:
        """It came, or does not come any more."""
        self._since.pop(flight, None)
        self._useless.discard(flight)

    async def run(self) -> None:
        while True:
            while not self._since:  # it may have landed before this task had its turn
                self._something = trio.Event()
                await self._something.wait()
            flight, since = next(iter(self._since.items()))
            await trio.sleep_until(since + self._patience_seconds())
            if self._since.get(flight) == since:
                del self._since[flight]
                self._ask(flight)

    def _patience_seconds(self) -> float:
        answer = self._answer_seconds()
        return max(LEAST_SECONDS, ANSWERS * answer) if answer < float("inf") else LEAST_SECONDS

    def _ask(self, flight: Flight) -> None:
        pages = waited_for(flight)
        if pages:
            logger.debug("page %d was guessed, and is overdue: it is asked for again", pages[0].start)
            self._asked.add(flight)
            want_leaves = any(self._sink.missing_leaves(part) for part in pages)
            on_done = partial(self._answered, flight)
            self._starter.start_fetch(pages, want_leaves=want_leaves, background=False, on_done=on_done)

    def _answered(self, flight: Flight, answer: Fetched | LazymemError) -> None:
        self._asked.discard(flight)
        if isinstance(answer, LazymemError):
            maybe_why: str | None = str(answer)
        else:
            maybe_why = None if self._on_early(flight, answer) else "wrong bytes"
        if not waited_for(flight):
            return
        if maybe_why is None:
            self._useless.discard(flight)
        elif flight in self._useless:  # as of any demand: from now on another server, where there is one
            self._starter.doubt(maybe_why)
        else:
            self._useless.add(flight)
        self.wait_for(flight)


def waited_for(flight: Flight) -> list[PageRange]:
    """What readers wait for of a request that is out, and is not here already, ascending."""
    if flight.handle is None:  # it landed
        return []
    return runs(
        page
        for want in flight.wants
        if want.state is State.SENT
        for demand in want.demands
        for page in range(max(want.pages.start, demand.pages.start), min(want.pages.end, demand.pages.end))
        if not any(page in run.pages for run in want.runs)
    )
