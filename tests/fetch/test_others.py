"""Demands for pages that another process has on its way: joined, asked for when they are late, and never lost."""

from __future__ import annotations

import math
from time import perf_counter

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from lazymem.fetch import others
from lazymem.fetch.coming import Coming
from lazymem.fetch.inflight import InFlightTable
from lazymem.fetch.prefetch import prepager
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PageRange, PageRun
from tests.fetch.conftest import Joined, Network
from tests.support.memorysink import MemorySink
from tests.support.peer import RAM_PAGES, Peer

ANSWER = 1000.0
"""Seconds: the tests' clock jumps, and the one that requests are timed by does not."""

PAGES = PageRange(10, 2)


@pytest.fixture
def begun() -> float:
    """When the request for `PAGES` was sent, of `perf_counter`."""
    return perf_counter()


@pytest.fixture
def coming(begun: float) -> Coming:
    """Requests take 500 s, and one of them brings `PAGES`."""
    found = Coming(RAM_PAGES)
    for _ in range(50):
        found.end(found.begin(begun), [], begun + 500)
    found.guess(found.begin(begun), PAGES)
    return found


class Waiting:
    """A reader of `PAGES`, or of some other ones."""

    def __init__(self, scheduler: Scheduler, nursery: trio.Nursery, pages: PageRange = PAGES) -> None:
        self.runs: list[PageRun] = []
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        nursery.start_soon(self._read, scheduler, pages)

    async def _read(self, scheduler: Scheduler, pages: PageRange) -> None:
        with self.scope:
            self.runs += await scheduler.demand(pages)
        self.ended.set()


async def made(network: Network, sink: MemorySink, nursery: trio.Nursery, coming: Coming) -> Scheduler:
    scheduler = Scheduler(await network.connect(), sink, nursery, maybe_coming=coming)
    assert scheduler._maybe_others is not None
    scheduler._maybe_others._answer_seconds = lambda: ANSWER  # of memory streams it is nothing
    return scheduler


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


def bring(sink: MemorySink, scheduler: Scheduler) -> None:
    """The other process keeps its pages."""
    sink.held |= set(range(PAGES.start, PAGES.end))
    scheduler.others_kept()


def assert_empty(scheduler: Scheduler, coming: Coming) -> None:
    assert not len(scheduler._table)
    assert not coming.is_demanded(PageRange(0, RAM_PAGES))
    assert not coming.is_waited_for


async def test_what_the_other_process_brings_in_time_is_not_asked_for(
    network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, coming: Coming, joined: Joined
) -> None:
    scheduler = await made(network, sink, nursery, coming)
    assert not scheduler.start(PAGES, lambda data: None, lambda: lambda answer: None)
    first = Waiting(scheduler, nursery)
    await settle()
    second = Waiting(scheduler, nursery, PageRange(11, 2))
    await settle()
    assert coming.is_waited_for
    assert [fetch.ranges for fetch in peer.fetches] == [(PageRange(12, 1),)], "of the second, the other page only"
    scheduler.others_kept()  # something else
    await settle()
    assert not first.runs
    bring(sink, scheduler)
    await settle()
    assert joined(first.runs) == peer.bytes_of(PAGES)
    assert joined(second.runs) == peer.bytes_of(PageRange(11, 2))
    await scheduler.wait_kept()
    assert len(peer.fetches) == 1
    assert_empty(scheduler, coming)


async def test_what_is_late_is_asked_for(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    coming: Coming,
    begun: float,
    joined: Joined,
) -> None:
    """Its process stands still, or its connection: nobody says a word, and the reader has its pages."""
    scheduler = await made(network, sink, nursery, coming)
    started = trio.current_time()
    assert joined(await scheduler.demand(PAGES)) == peer.bytes_of(PAGES)
    waited = trio.current_time() - started
    assert waited <= ANSWER
    assert waited + perf_counter() - begun > 499, "the time that really passed was waited for too"
    await scheduler.wait_kept()
    assert_empty(scheduler, coming)


async def test_who_joins_what_was_late_does_not_wait_for_them_again(
    autojump_clock: MockClock, sink: MemorySink, nursery: trio.Nursery, coming: Coming
) -> None:
    """Where there is no room yet to ask for it."""
    table, late = InFlightTable(coming), trio.Event()
    waiting = others.Others(coming, table, sink, nursery, lambda: ANSWER, late.set)  # which sends nothing
    first = table.demand(PAGES, lambda: None)
    waiting.leave_to_them(first.wants)
    assert not table.has_waiting
    await late.wait()
    second = table.demand(PAGES, lambda: None)
    assert second.wants == first.wants
    waiting.leave_to_them(second.wants)
    assert table.has_waiting


async def test_what_is_not_on_its_way_or_comes_too_late_is_asked_for_at_once(
    network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, coming: Coming
) -> None:
    scheduler = await made(network, sink, nursery, coming)
    Waiting(scheduler, nursery, PageRange(9, 2))
    await settle()
    assert scheduler._maybe_others is not None
    scheduler._maybe_others._answer_seconds = lambda: 100.0
    Waiting(scheduler, nursery, PageRange(11, 1))
    await settle()
    assert [fetch.ranges for fetch in peer.fetches] == [(PageRange(9, 2),), (PageRange(11, 1),)]


async def test_the_end_of_the_other_process_is_no_readers_end(
    network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, coming: Coming, joined: Joined
) -> None:
    scheduler = await made(network, sink, nursery, coming)
    reader = Waiting(scheduler, nursery)
    await settle()
    scheduler.others_ended()
    await settle()
    assert joined(reader.runs) == peer.bytes_of(PAGES)
    assert not coming.is_waited_for
    assert scheduler.start(PageRange(20, 1), lambda data: None, lambda: lambda answer: None)
    coming.guess(1, PageRange(30, 1))
    assert scheduler.start(PageRange(30, 1), lambda data: None, lambda: lambda answer: None), "its marks say nothing"


async def test_wrong_bytes_of_the_other_process_are_asked_for_when_it_is_late(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    coming: Coming,
    joined: Joined,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rule 3: what is called held, and does not have its digest, is given to nobody."""
    monkeypatch.setattr(sink, "maybe_read_held_nowait", lambda pages: None)
    scheduler = await made(network, sink, nursery, coming)
    reader = Waiting(scheduler, nursery)
    await settle()
    scheduler.others_kept()
    with trio.fail_after(2 * ANSWER):
        await reader.ended.wait()
    assert joined(reader.runs) == peer.bytes_of(PAGES)


async def test_a_reader_that_leaves_leaves_nothing(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, coming: Coming
) -> None:
    scheduler = await made(network, sink, nursery, coming)
    reader = Waiting(scheduler, nursery)
    await settle()
    reader.scope.cancel()
    await settle()
    assert not len(scheduler._table)
    scheduler.others_kept()
    await trio.sleep(2 * ANSWER)
    assert_empty(scheduler, coming)
    assert not peer.fetches


async def test_nothing_is_guessed_that_the_other_process_has_on_its_way(
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    coming: Coming,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it sees what we have."""
    monkeypatch.setattr(others, "SHORTEST_ROUND_TRIP_SECONDS", 0.0)
    peer.answers = lambda peer, request: None
    prefetcher = prepager(sink.next_missing, RAM_PAGES)
    Scheduler(await network.connect(), sink, nursery, maybe_coming=coming, prefetcher=prefetcher)
    await settle()
    asked = [page for fetch in peer.fetches for pages in fetch.ranges for page in range(pages.start, pages.end)]
    assert asked
    assert not set(asked) & set(range(PAGES.start, PAGES.end))
    assert all(coming.is_demanded(PageRange(page, 1)) for page in asked)


@pytest.mark.parametrize(
    ("rate", "answer_seconds", "tells"),
    [
        (12.5e6, 0.02, True),
        (12.5e6, 0.001, False),
        (12.5e6, math.inf, False),
        (0.0, 0.02, False),
        (math.inf, 0.02, False),
        (math.nan, 0.02, False),
    ],
)
async def test_what_the_other_process_knows_of_a_slow_link_is_where_the_window_begins(
    network: Network,
    sink: MemorySink,
    nursery: trio.Nursery,
    coming: Coming,
    rate: float,
    answer_seconds: float,
    tells: bool,
) -> None:
    coming.tell_rate(rate)
    scheduler = await made(network, sink, nursery, coming)
    assert scheduler._maybe_others is not None
    assert not scheduler._window.knows_link
    first = scheduler._window.pages
    scheduler._maybe_others._answer_seconds = lambda: answer_seconds
    scheduler.look_for_guesses()
    assert scheduler._window.knows_link == tells
    assert (scheduler._window.pages > first) == tells
