"""The in-flight table: which pages are wanted, on their way, or here and not yet kept, and who waits for them. Pure.

Invariants (the Hypothesis test holds them):

- a page is in at most one want (rule 4: one fetch a page at a time);
- a want is in the table from its creation until it is kept, failed or abandoned, and never after;
- a demand is open as long as one of its wants has neither arrived nor failed; when the last one settles, or one
  fails, its `wake` is called exactly once, unless it left before.

A want that waits is always a demanded one: guessed ranges enter the table when they are sent (`add_background`), so a
demand never has to take pages out of a queue of guesses. A demand for pages of a guess that was sent joins it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from lazymem.errors import LazymemError
from lazymem.pages import PAGE_SHIFT, PageRange, PageRun


class State(enum.Enum):
    WAITING = enum.auto()
    """Nothing was sent for it."""
    SENT = enum.auto()
    HERE = enum.auto()
    """Verified and in memory; leaves the table when the sink has kept it."""
    GONE = enum.auto()
    """Out of the table: kept, failed or abandoned."""


class Want:
    """Consecutive pages that travel together. `runs` (of the whole request) is set once they are here; before that it
    is what came early, for readers who wait for no more of it. `is_late`: another process was to bring them, and did
    not in time."""

    __slots__ = ("attempts", "background", "demands", "error", "is_late", "pages", "runs", "state")

    def __init__(self, pages: PageRange, background: bool) -> None:
        self.pages = pages
        self.background = background
        self.state = State.SENT if background else State.WAITING
        self.attempts = 0
        self.is_late = False
        self.demands: list[Demand] = []
        self.runs: Sequence[PageRun] = ()
        self.error: LazymemError | None = None


class Demand:
    """One reader's pages. `open` counts the wants that it still waits for; `error` is the first failure."""

    __slots__ = ("error", "open", "pages", "wake", "wants")

    def __init__(self, pages: PageRange, wake: Callable[[], None]) -> None:
        self.pages = pages
        self.wake = wake
        self.wants: list[Want] = []
        self.open = 0
        self.error: LazymemError | None = None

    def collect(self) -> list[PageRun]:
        """The demanded pages, in order, once nothing is open. Raises the failure, if there was one."""
        if self.error is not None:
            raise self.error
        assert self.open == 0
        if len(self.wants) == 1 and self.wants[0].pages == self.pages:
            return cut_runs(self.wants[0].runs, self.pages)
        found: list[PageRun] = []
        for want in self.wants:
            start, end = max(want.pages.start, self.pages.start), min(want.pages.end, self.pages.end)
            found += cut_runs(want.runs, PageRange(start, end - start))
        return found


class Noted(Protocol):
    """Where others see what is in the table: `coming.Coming`."""

    def demand(self, pages: PageRange) -> None: ...

    def forget(self, pages: PageRange) -> None: ...


class InFlightTable:
    """All wants by page."""

    def __init__(self, maybe_noted: Noted | None = None) -> None:
        self._maybe_noted = maybe_noted
        self._by_page: dict[int, Want] = {}
        self._waiting: dict[Want, None] = {}
        self.in_flight_pages = 0
        self.background_in_flight_pages = 0
        self.unkept_pages = 0

    def __len__(self) -> int:
        """Pages in the table."""
        return len(self._by_page)

    @property
    def waiting(self) -> list[Want]:
        """Demanded wants that nothing was sent for, oldest first."""
        return list(self._waiting)

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def find(self, page: int) -> Want | None:
        return self._by_page.get(page)

    def is_free(self, pages: PageRange) -> bool:
        """Whether none of `pages` is in a want."""
        by_page = self._by_page
        if pages.count == 1:
            return pages.start not in by_page
        return by_page.keys().isdisjoint(range(pages.start, pages.end))

    def demand(self, pages: PageRange, wake: Callable[[], None]) -> Demand:
        """Enter a reader: join the wants that exist, make waiting ones for the other pages."""
        demand = Demand(pages, wake)
        for piece, maybe_want in self._pieces(pages):
            want = maybe_want or self._enter(Want(piece, background=False))
            demand.wants.append(want)
            if want.state is not State.HERE and not _covers(want.runs, piece):
                want.demands.append(demand)
                demand.open += 1
        return demand

    def join(self, want: Want, wake: Callable[[], None]) -> Demand:
        """A reader of all that `want` brings, which is on its way."""
        demand = Demand(want.pages, wake)
        demand.wants.append(want)
        demand.open = 1
        want.demands.append(demand)
        return demand

    def enter_sent(self, want: Want) -> None:
        """Enter a demanded want for which a request was sent already. Its pages must be `free`."""
        by_page, pages = self._by_page, want.pages
        if pages.count == 1:
            by_page[pages.start] = want
        else:
            by_page.update(dict.fromkeys(range(pages.start, pages.end), want))
        if self._maybe_noted is not None:
            self._maybe_noted.demand(pages)
        self.in_flight_pages += pages.count

    def leave(self, demand: Demand) -> list[Want]:
        """A reader is gone. Wants that nobody waits for now: waiting ones are dropped, sent ones returned.

        The caller may `abandon` what is returned, or let it arrive.
        """
        orphans: list[Want] = []
        for want in demand.wants:
            if demand not in want.demands:
                continue
            want.demands.remove(demand)
            if want.demands or want.background:
                continue
            if want.state is State.WAITING:
                self._forget(want)
            else:
                orphans.append(want)
        demand.open = 0
        return orphans

    def free(self, pages: PageRange) -> list[PageRange]:
        """The parts of `pages` that are in no want."""
        return [piece for piece, maybe_want in self._pieces(pages) if maybe_want is None]

    def add_background(self, pages: PageRange) -> Want:
        """Enter a guess that is being sent. `pages` must be `free`."""
        return self._enter(Want(pages, background=True))

    def sent(self, want: Want) -> None:
        assert want.state is State.WAITING
        del self._waiting[want]
        want.state = State.SENT
        self.in_flight_pages += want.pages.count

    def requeue(self, want: Want) -> None:
        """What was sent brought nothing usable: it waits again, as demanded, with one more attempt counted."""
        self._unsend(want)
        want.attempts += 1
        want.background = False
        want.state = State.WAITING
        self._waiting[want] = None

    def hold(self, want: Want) -> None:
        """As `requeue`, but nothing is to be sent for it before `release`."""
        self.requeue(want)
        del self._waiting[want]

    def withhold(self, want: Want) -> None:
        """Nothing is to be sent for a waiting one before `release`."""
        assert want.state is State.WAITING
        del self._waiting[want]

    def brought_by_others(self, want: Want, runs: Sequence[PageRun]) -> None:
        """The verified pages of a withheld one are in the sink: nothing was asked for it, and nothing is to be kept."""
        self._forget(want)
        want.runs = runs
        self._wake(want)

    def release(self, want: Want) -> None:
        """It waits like others now, unless nobody waits for it any more."""
        if want.state is State.WAITING:
            self._waiting[want] = None

    def arrived(self, want: Want, runs: Sequence[PageRun]) -> None:
        """Verified pages are here: wake the readers that waited for nothing else."""
        self._unsend(want)
        want.state = State.HERE
        want.runs = runs
        self.unkept_pages += want.pages.count
        self._wake(want)

    def _wake(self, want: Want) -> None:
        demands, want.demands = want.demands, []
        for demand in demands:
            demand.open -= 1
            if not demand.open and demand.error is None:
                demand.wake()

    def came_early(self, want: Want, runs: Sequence[PageRun]) -> None:
        """Verified pages of it are here before the others: wake the readers that waited for nothing else.

        Some of them may be here already: a later reader has a frame given again, and what was asked for a second time
        (`overdue`) is cut in other places than the frames of the first.
        """
        assert want.state is State.SENT
        for run in runs:
            want.runs = sorted([*want.runs, *_fresh(run, want.runs)], key=lambda here: here.pages.start)
        for demand in list(want.demands):
            start, end = max(want.pages.start, demand.pages.start), min(want.pages.end, demand.pages.end)
            if _covers(want.runs, PageRange(start, end - start)):
                want.demands.remove(demand)
                demand.open -= 1
                if not demand.open and demand.error is None:
                    demand.wake()

    def kept(self, want: Want) -> None:
        """The sink has the pages (or never will): readers ask the sink from now on."""
        assert want.state is State.HERE
        self._forget(want)

    def failed(self, want: Want, error: LazymemError) -> None:
        """Nothing will come: wake everybody who waits, with the error."""
        self._forget(want)
        want.error = error
        demands, want.demands = want.demands, []
        for demand in demands:
            demand.open -= 1
            if demand.error is None:
                demand.error = error
                demand.wake()

    def abandon(self, want: Want) -> None:
        """Nobody waits and it was cancelled."""
        assert not want.demands
        self._forget(want)

    def _pieces(self, pages: PageRange) -> list[tuple[PageRange, Want | None]]:
        """`pages` cut where the want changes, in order."""
        get = self._by_page.get
        if pages.count == 1:
            return [(pages, get(pages.start))]
        found: list[tuple[PageRange, Want | None]] = []
        start, current = pages.start, get(pages.start)
        for page in range(pages.start + 1, pages.end):
            want = get(page)
            if want is not current:
                found.append((PageRange(start, page - start), current))
                start, current = page, want
        found.append((PageRange(start, pages.end - start), current))
        return found

    def _enter(self, want: Want) -> Want:
        by_page, pages = self._by_page, want.pages
        for page in range(pages.start, pages.start + pages.count):
            assert page not in by_page
            by_page[page] = want
        if self._maybe_noted is not None:
            self._maybe_noted.demand(pages)
        if want.state is State.WAITING:
            self._waiting[want] = None
        else:
            self.in_flight_pages += want.pages.count
            self.background_in_flight_pages += want.pages.count
        return want

    def _unsend(self, want: Want) -> None:
        assert want.state is State.SENT
        self.in_flight_pages -= want.pages.count
        if want.background:
            self.background_in_flight_pages -= want.pages.count

    def _forget(self, want: Want) -> None:
        by_page, pages = self._by_page, want.pages
        if want.state is State.WAITING:
            self._waiting.pop(want, None)  # it may be held
        elif want.state is State.SENT:
            self._unsend(want)
        else:
            assert want.state is State.HERE
            self.unkept_pages -= pages.count
        for page in range(pages.start, pages.start + pages.count):
            del by_page[page]
        if self._maybe_noted is not None:
            self._maybe_noted.forget(pages)
        want.state = State.GONE


def _covers(runs: Sequence[PageRun], pages: PageRange) -> bool:
    """Whether ascending `runs`, which do not overlap, have all of `pages`."""
    page = pages.start
    for run in runs:
        if run.pages.start <= page < run.pages.end:
            page = run.pages.end
    return page >= pages.end


def _fresh(run: PageRun, runs: Sequence[PageRun]) -> list[PageRun]:
    """The parts of `run` that ascending `runs`, which do not overlap, have not. No byte is copied."""
    found: list[PageRun] = []
    start, end = run.pages.start, run.pages.end
    for here in runs:
        if start < min(here.pages.start, end):
            found += cut_runs((run,), PageRange(start, min(here.pages.start, end) - start))
        start = max(start, here.pages.end)
    if start < end:
        found += cut_runs((run,), PageRange(start, end - start))
    return found


def cut_runs(runs: Sequence[PageRun], pages: PageRange) -> list[PageRun]:
    """The part of ascending, gapless `runs` that covers `pages`; no byte is copied."""
    if len(runs) == 1 and runs[0].pages == pages:
        return [runs[0]]
    found: list[PageRun] = []
    for run in runs:
        start, end = max(run.pages.start, pages.start), min(run.pages.end, pages.end)
        if start >= end:
            continue
        if start == run.pages.start and end == run.pages.end:
            found.append(run)
            continue
        data = run.data
        if data is not None:
            at = (start - run.pages.start) << PAGE_SHIFT
            data = memoryview(data)[at : at + ((end - start) << PAGE_SHIFT)]
        found.append(PageRun(PageRange(start, end - start), data))
    return found
