"""The scheduler between readers, a source and a sink: rules 3, 4, 5, and what is left behind."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from lazymem.errors import DeadlineError, ServerRefusedError, ServerUnreachableError, StoreError
from lazymem.fetch import guesses
from lazymem.fetch import scheduler as scheduler_module
from lazymem.fetch.inflight import Demand, Want
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.plan import Budget
from lazymem.fetch.prefetch import prepager
from lazymem.fetch.requests import FetchRequest
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PAGE_SIZE, Fetched, PageRange, PageRun
from lazymem.wire.messages import Cancel, Encoding, Error, ErrorCode, Fetch, Message, Pages
from tests.fetch.conftest import Joined, Network, assert_empty, settle
from tests.support.memorysink import MemorySink
from tests.support.peer import RAM_PAGES, Peer, digests_of, is_background


def asked_pages(peer: Peer) -> list[int]:
    return [page for fetch in peer.fetches for pages in fetch.ranges for page in range(pages.start, pages.end)]


# ---- readers


async def test_demand_brings_pages_and_keeps_them(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    pages = PageRange(3, 20)
    assert joined(await scheduler.demand(pages)) == peer.bytes_of(pages)
    await scheduler.wait_kept()
    assert sink.held == set(range(3, 23))
    statistics = scheduler.statistics()
    assert (statistics.demand_faults, statistics.demand_pages) == (1, 20)
    assert statistics.wait_p50_seconds is not None
    assert statistics.link is not None
    assert statistics.link.connected
    assert_empty(scheduler)


async def test_leaves_are_wanted_when_the_sink_lacks_them(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await scheduler.demand(PageRange(0, 1))
    sink.leaves_wanted = True
    await scheduler.demand(PageRange(1, 1))
    assert [int(fetch.flags) for fetch in peer.fetches] == [0, 2]


async def test_many_readers_of_a_page_make_one_fetch(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    results: list[bytes] = []

    async def read(pages: PageRange) -> None:
        results.append(joined(await scheduler.demand(pages)))

    async with trio.open_nursery() as readers:
        for _ in range(20):
            readers.start_soon(read, PageRange(10, 2))
            readers.start_soon(read, PageRange(11, 2))
    assert sorted(asked_pages(peer)) == [10, 11, 12]
    assert results.count(peer.bytes_of(PageRange(10, 2))) == 20
    assert results.count(peer.bytes_of(PageRange(11, 2))) == 20


async def test_an_answer_in_several_frames_took_as_long_as_it_took(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    """Counted from its last frame on it would be the best round trip of all, and no guess would ever get a window."""
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery)
    answers: list[object] = []
    pages = PageRange(3, 20)
    assert scheduler.start(pages, answers.append, lambda: answers.append)
    await settle()
    time.sleep(0.05)  # noqa: ASYNC251 (the clock that counts waiting is not trio's)
    for frame in peer.pages(peer.fetches[0].id, (pages,), frame_pages=8):
        await peer.say(frame)
    await settle()
    assert len(answers) == 1
    assert scheduler.best_answer_seconds >= 0.05
    await scheduler.wait_kept()
    assert_empty(scheduler)


async def test_page_that_is_not_kept_yet_is_answered_from_memory(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    sink.open = trio.Event()
    scheduler = Scheduler(await network.connect(), sink, nursery)
    for _ in range(3):
        assert joined(await scheduler.demand(PageRange(5, 2))) == peer.bytes_of(PageRange(5, 2))
    assert asked_pages(peer) == [5, 6]
    assert scheduler.statistics().unkept_pages == 2
    sink.open.set()
    await scheduler.wait_kept()
    assert_empty(scheduler)


async def test_readers_share_requests_once_the_slots_are_taken(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery, budget=Budget(max_demand_requests=2))
    async with trio.open_nursery() as readers:
        for page in range(0, 40, 2):
            readers.start_soon(scheduler.demand, PageRange(page, 1))
        await settle()
        assert [len(fetch.ranges) for fetch in peer.fetches] == [1, 1]
        peer.answers = None
        await peer.say(peer.honest(peer.fetches[0])[0])
        await settle()
        assert [len(fetch.ranges) for fetch in peer.fetches] == [1, 1, 18]
        await peer.say(peer.honest(peer.fetches[1])[0])
    assert len(asked_pages(peer)) == len(set(asked_pages(peer))) == 20


async def test_slow_cache_bounds_memory_and_loses_nobody(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    sink.open = trio.Event()
    scheduler = Scheduler(await network.connect(), sink, nursery, budget=Budget(max_unkept_pages=10))
    async with trio.open_nursery() as readers:
        for page in range(30):
            await scheduler.demand(PageRange(page, 1)) if page < 10 else readers.start_soon(
                scheduler.demand, PageRange(page, 1)
            )
        await settle()
        assert len(asked_pages(peer)) == 10
        sink.open.set()
    assert sorted(asked_pages(peer)) == list(range(30))


async def test_full_disk_harms_no_reader_and_stops_the_guesses(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink.maybe_error = StoreError("no space left")
    scheduler = Scheduler(await network.connect(), sink, nursery, prefetcher=prepager(sink.next_missing, RAM_PAGES))
    await settle()
    for page in (1, 1, 2):
        assert joined(await scheduler.demand(PageRange(page, 1))) == peer.bytes_of(PageRange(page, 1))
        await scheduler.wait_kept()
    assert scheduler.maybe_not_kept == "no space left"
    guesses_a_try = sum(is_background(fetch) for fetch in peer.fetches)
    await trio.sleep(60)
    assert sum(is_background(fetch) for fetch in peer.fetches) <= 6 * guesses_a_try, "after 2, 6, 14, 30 and 60 seconds"
    assert sum("no space left" in record.message for record in caplog.records) == 1
    assert_empty(scheduler)
    sink.maybe_error = None
    await trio.sleep(60)
    assert sink.held == set(range(RAM_PAGES)), "they go on once there is room"
    assert scheduler.maybe_not_kept is None
    assert_empty(scheduler)


async def test_pages_do_not_wait_for_the_cycle_collector(
    autojump_clock: MockClock, network: Network, sink: MemorySink, nursery: trio.Nursery
) -> None:
    """A guest faults thousands of times a second: cycles would hold its pages and stop the daemon for the collector."""
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await scheduler.demand(PageRange(0, 1))
    await scheduler.wait_kept()
    gc.collect()
    gc.disable()
    try:
        for page in range(1, 101):
            await scheduler.demand(PageRange(page, 1))
        await scheduler.wait_kept()
        flights = [found for found in gc.get_objects() if isinstance(found, Demand | Want | FetchRequest)]
        assert len(flights) < 5
    finally:
        gc.enable()


# ---- leaving


async def test_cancelled_reader_costs_the_others_nothing(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery)
    scope = trio.CancelScope()
    results: list[bytes] = []

    async def leaver() -> None:
        with scope:
            await scheduler.demand(PageRange(5, 1))

    async def stayer() -> None:
        results.append(joined(await scheduler.demand(PageRange(5, 1))))

    async with trio.open_nursery() as readers:
        readers.start_soon(leaver)
        readers.start_soon(stayer)
        await settle()
        scope.cancel()
        await settle()
        await peer.say(peer.honest(peer.fetches[0])[0])
    assert results == [peer.bytes_of(PageRange(5, 1))]
    assert len(peer.requests) == 1
    await scheduler.wait_kept()
    assert_empty(scheduler)


async def test_request_that_nobody_waits_for_is_cancelled(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery, budget=Budget(max_demand_requests=1))
    with trio.move_on_after(5):
        async with trio.open_nursery() as readers:
            for page in range(5):
                readers.start_soon(scheduler.demand, PageRange(page, 1))
    await settle()
    assert len(peer.fetches) >= 1
    assert [fetch.id for fetch in peer.fetches] == [cancel.id for cancel in peer.requests if isinstance(cancel, Cancel)]
    assert_empty(scheduler)
    peer.answers = None
    await scheduler.demand(PageRange(0, 5))


async def test_deadline_is_the_readers_and_leaves_nothing(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery, deadline_seconds=30)
    network.peer = None
    await network.cut()
    started_at = trio.current_time()
    with pytest.raises(DeadlineError, match="page 7 did not come within 30 s"):
        await scheduler.demand(PageRange(7, 1))
    assert 30 <= trio.current_time() - started_at < 31
    assert_empty(scheduler)
    network.peer = peer
    await scheduler.demand(PageRange(7, 1))


async def test_without_a_deadline_a_reader_waits_for_hours(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    network.peer = None
    await network.cut()
    async with trio.open_nursery() as readers:
        readers.start_soon(scheduler.demand, PageRange(7, 1))
        await trio.sleep(2 * 3600)
        assert scheduler.statistics().queued_demands + scheduler.statistics().in_flight_pages == 1
        network.peer = peer


# ---- wrong bytes


class FlippingPeer(Peer):
    """Its first `flips` answers for page `page` have a flipped bit, with a digest that fits."""

    def __init__(self, honest: Peer, page: int, flips: int) -> None:
        super().__init__(honest.ram)
        self.page = page
        self.flips = flips

    def frame(self, request_id: int, pages: PageRange, final: bool = True) -> Pages:
        if self.page not in pages or self.flips <= 0:
            return super().frame(request_id, pages, final)
        self.flips -= 1
        data = bytearray(self.bytes_of(pages))
        data[(self.page - pages.start) * PAGE_SIZE + 99] ^= 4
        return Pages(request_id, pages, Encoding.RAW, bytes(data), digests_of(bytes(data)), final)


async def test_flipped_bit_is_asked_for_again(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    network.peer = flipping = FlippingPeer(peer, page=5, flips=1)
    scheduler = Scheduler(await network.connect(), sink, nursery)
    assert joined(await scheduler.demand(PageRange(4, 3))) == peer.bytes_of(PageRange(4, 3))
    assert asked_pages(flipping) == [4, 5, 6, 4, 5, 6]


async def test_a_link_that_flips_bits_for_a_while_costs_time_and_no_guest(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    """Many times in a row wrong; meanwhile others are served, and who gives up leaves nothing behind."""
    network.peer = flipping = FlippingPeer(peer, page=5, flips=12)
    scheduler = Scheduler(await network.connect(), sink, nursery)
    found: list[bytes] = []

    async def read() -> None:
        found.append(joined(await scheduler.demand(PageRange(5, 1))))

    async with trio.open_nursery() as readers:
        readers.start_soon(read)
        while flipping.flips > 6:  # noqa: ASYNC110  # the peer is no task of ours
            await trio.sleep(0.01)
        assert joined(await scheduler.demand(PageRange(9, 1))) == peer.bytes_of(PageRange(9, 1))
        assert not found
        with trio.move_on_after(0.01):
            await scheduler.demand(PageRange(5, 1))
    assert found == [peer.bytes_of(PageRange(5, 1))]
    flipping.flips = 1000
    flipping.page = 20
    with trio.move_on_after(20):
        await scheduler.demand(PageRange(20, 1))
    await trio.sleep(60)
    await scheduler.wait_kept()
    assert_empty(scheduler)


async def test_a_request_that_is_called_bad_is_asked_again(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    """It was right when it left: the wire may have made it so."""
    refusals = 5

    def answers(peer: Peer, request: Message) -> list[Message]:
        nonlocal refusals
        refusals -= 1
        return [Error(request.id, ErrorCode.BAD_REQUEST, "no")] if refusals >= 0 else peer.honest(request)  # type: ignore[union-attr]

    peer.answers = answers
    scheduler = Scheduler(await network.connect(), sink, nursery)
    assert joined(await scheduler.demand(PageRange(4, 3))) == peer.bytes_of(PageRange(4, 3))
    assert refusals == -1
    await scheduler.wait_kept()
    assert_empty(scheduler)


async def test_wrong_bytes_again_and_again_stall_their_readers_only(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    """Page 5 shares a request with page 9, whose reader must not suffer."""
    network.peer = flipping = FlippingPeer(peer, page=5, flips=1000)
    flipping.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery, budget=Budget(max_demand_requests=1))
    outcome: dict[int, bytes] = {}

    async def read(page: int) -> None:
        outcome[page] = joined(await scheduler.demand(PageRange(page, 1)))

    async with trio.open_nursery() as readers:
        for page in (1, 5, 9):
            readers.start_soon(read, page)
            await settle()
        flipping.answers = None
        await flipping.say(flipping.honest(flipping.fetches[0])[0])
        await trio.sleep(600)
        assert flipping.fetches[1].ranges == (PageRange(5, 1), PageRange(9, 1))
        assert outcome == {page: peer.bytes_of(PageRange(page, 1)) for page in (1, 9)}
        assert 60 < len(flipping.fetches) < 500
        network.peer = peer
        await network.cut()
    assert outcome[5] == peer.bytes_of(PageRange(5, 1))
    await scheduler.wait_kept()
    assert_empty(scheduler)


@pytest.mark.parametrize("code", [code for code in ErrorCode if code.name != "BUSY"])
async def test_whatever_error_a_server_answers_with_its_reader_gets_the_page_in_the_end(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
    code: ErrorCode,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also by those that make no sense for pages: a guest would die of them."""
    peer.answers = lambda peer, request: [Error(request.id, code, "no")]  # type: ignore[union-attr]
    scheduler = Scheduler(await network.connect(), sink, nursery)
    async with trio.open_nursery() as readers:
        readers.start_soon(scheduler.demand, PageRange(3, 1))
        await trio.sleep(3600)
        assert len(peer.fetches) > 60
        peer.answers = None
    assert len(caplog.records) < 40
    await scheduler.wait_kept()
    assert sink.held == {3}
    assert_empty(scheduler)


async def test_a_deadline_ends_the_waiting_for_right_bytes(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    network.peer = FlippingPeer(peer, page=5, flips=1000)
    scheduler = Scheduler(await network.connect(), sink, nursery, deadline_seconds=100)
    with pytest.raises(DeadlineError):
        await scheduler.demand(PageRange(5, 1))
    await trio.sleep(60)
    assert 5 not in sink.held
    assert_empty(scheduler)


async def test_wrong_guess_reaches_nobody_and_the_sweep_ends(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    network.peer = flipping = FlippingPeer(peer, page=100, flips=1_000_000)
    scheduler = Scheduler(await network.connect(), sink, nursery, prefetcher=prepager(sink.next_missing, RAM_PAGES))
    await trio.sleep(60)
    assert not scheduler.statistics().prefetching
    assert 100 not in sink.held
    assert len(sink.held) > RAM_PAGES - 100
    assert len(flipping.fetches) < 200
    assert_empty(scheduler)


# ---- guesses


async def test_prefetch_all_brings_everything_once_and_stops(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery, prefetcher=prepager(sink.next_missing, RAM_PAGES))
    await trio.sleep(60)
    assert sorted(asked_pages(peer)) == list(range(RAM_PAGES))
    assert all(is_background(fetch) for fetch in peer.fetches)
    assert sink.held == set(range(RAM_PAGES))
    assert not scheduler.statistics().prefetching
    assert_empty(scheduler)


async def test_prefetch_of_ranges_returns_when_they_are_kept(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    sink.held = {10, 11, 50}
    await scheduler.prefetch([PageRange(8, 100), PageRange(200, 1)])
    assert sink.held == {*range(8, 108), 200}
    assert sorted(asked_pages(peer)) == sorted({*range(8, 108), 200} - {10, 11, 50})
    await scheduler.prefetch([])
    await scheduler.prefetch([PageRange(8, 10)])
    assert_empty(scheduler)


class PickySink(MemorySink):
    """Wants only what lies behind page `wanted_from`, and counts how often it is asked."""

    wanted_from = 0
    looks = 0

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        self.looks += 1
        start = max(pages.start, self.wanted_from)
        return [PageRange(start, pages.end - start)] if start < pages.end else []


async def test_prefetch_goes_on_behind_much_that_is_not_worth_fetching(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guesses, "MAX_LOOKED_AT_PAGES", 20)
    sink = PickySink(peer.ram)
    sink.wanted_from = 400
    scheduler = Scheduler(await network.connect(), sink, nursery)
    with trio.fail_after(60):
        await scheduler.prefetch([PageRange(0, RAM_PAGES)])
    assert sink.held == set(range(400, RAM_PAGES))
    assert_empty(scheduler)


async def test_looks_at_what_is_not_worth_fetching_leave_turns_to_others(
    autojump_clock: MockClock, network: Network, peer: Peer, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often guesses are asked for meanwhile, there is one look between two turns of another task."""
    monkeypatch.setattr(guesses, "MAX_LOOKED_AT_PAGES", 16)
    sink = PickySink(peer.ram)
    sink.wanted_from = RAM_PAGES
    scheduler = Scheduler(await network.connect(), sink, nursery)
    sink.looks = 0
    async with trio.open_nursery() as tasks:
        tasks.start_soon(scheduler.prefetch, [PageRange(0, RAM_PAGES)])
        await trio.lowlevel.checkpoint()
        most = 0
        for _ in range(20):
            before = sink.looks
            scheduler._fill_background()  # as whenever something was kept
            await trio.lowlevel.checkpoint()
            most = max(most, sink.looks - before)
    assert sink.looks > RAM_PAGES // 16
    assert most <= 2 * 2 * 2, "two looks of two pieces, and another one if the tasks' order is so"
    assert_empty(scheduler)


async def test_demand_waits_for_no_guess_when_the_background_lane_is_saturated(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    """Rule 5: no answer to any guess comes, and demands are answered all the same."""

    def demand_only(peer: Peer, request: Message) -> Sequence[Message] | None:
        assert isinstance(request, Fetch)
        return None if is_background(request) else peer.honest(request)

    peer.answers = demand_only
    scheduler = Scheduler(await network.connect(), sink, nursery, prefetcher=prepager(sink.next_missing, RAM_PAGES))
    await settle()
    guessed = set(asked_pages(peer))
    assert guessed
    assert len(guessed) <= 64
    for page in range(RAM_PAGES - 1, RAM_PAGES - 50, -1):
        with trio.fail_after(0.001):
            assert joined(await scheduler.demand(PageRange(page, 1))) == peer.bytes_of(PageRange(page, 1))
    assert {page for page in asked_pages(peer) if page < RAM_PAGES - 64} >= guessed


@pytest.mark.parametrize("short_way", [True, False])
async def test_what_surrounds_a_fault_is_asked_for_right_behind_it(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    short_way: bool,
) -> None:
    """While the guest waits for its page the link has nothing better to do. Who fills elsewhere hears of it."""
    peer.answers = lambda peer, request: None
    last_demand = LastDemand()
    guesses = prepager(sink.next_missing, RAM_PAGES, sweep=False)
    scheduler = Scheduler(await network.connect(), sink, nursery, prefetcher=guesses, last_demand=last_demand)
    assert not last_demand.is_near
    pages = PageRange(40, 1)
    if short_way:
        assert scheduler.start(pages, lambda _: None, lambda: lambda _: None)
    else:
        nursery.start_soon(scheduler.demand, pages)
    await settle()
    first, *others = peer.fetches
    assert (first.ranges, is_background(first)) == ((pages,), False)
    assert others
    assert all(is_background(fetch) for fetch in others)
    asked = {page for fetch in others for run in fetch.ranges for page in range(run.start, run.end)}
    assert asked <= set(range(32, 64)) - {40}
    assert last_demand.is_near
    assert last_demand.seconds > 0
    nursery.cancel_scope.cancel()


async def test_demand_joins_a_guess_that_is_on_its_way(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery)
    results: list[bytes] = []

    async def read(pages: PageRange) -> None:
        results.append(joined(await scheduler.demand(pages)))

    async with trio.open_nursery() as tasks:
        tasks.start_soon(scheduler.prefetch, [PageRange(0, 4)])
        await settle()
        tasks.start_soon(read, PageRange(2, 4))
        await settle()
        assert [fetch.ranges for fetch in peer.fetches] == [(PageRange(0, 4),), (PageRange(4, 2),)]
        for connection, fetch in ((1, 0), (0, 1)):
            await peer.say(peer.honest(peer.fetches[fetch])[0], connection)
    assert results == [peer.bytes_of(PageRange(2, 4))]


async def test_demand_that_joined_a_guess_survives_its_connection(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery)
    results: list[bytes] = []

    async def read() -> None:
        results.append(joined(await scheduler.demand(PageRange(2, 1))))

    async with trio.open_nursery() as tasks:
        tasks.start_soon(scheduler.prefetch, [PageRange(0, 4)])
        await settle()
        tasks.start_soon(read)
        await settle()
        peer.answers = None
        network.lines.pop(0)  # the demand connection stays
        network.peer = replace(peer, identity=b"\1" * 32)  # nobody takes the background connection back
        await network.cut()
        await trio.sleep(10)
        assert results == [peer.bytes_of(PageRange(2, 1))]
    await scheduler.wait_kept()
    assert_empty(scheduler)


async def test_cancelled_prefetch_takes_back_what_was_not_sent(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery)
    with trio.move_on_after(1):
        await scheduler.prefetch([PageRange(0, RAM_PAGES)])
    sent = len(asked_pages(peer))
    assert 0 < sent < RAM_PAGES
    peer.answers = None
    for fetch in list(peer.fetches):
        for message in peer.honest(fetch):
            await peer.say(message)
    await trio.sleep(10)
    assert len(asked_pages(peer)) == sent
    assert_empty(scheduler)


# ---- other sources, and every failure


class FailingSource:
    """A plain source whose fetches fail by number, to be awaited only."""

    total_pages = RAM_PAGES

    def __init__(self, peer: Peer, failing: dict[int, Exception]) -> None:
        self.peer = peer
        self.failing = failing
        self.calls = 0
        self.open = 0

    async def fetch(
        self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
    ) -> Fetched:
        self.calls += 1
        call = self.calls
        self.open += 1
        try:
            await trio.sleep(0.01)
        finally:
            self.open -= 1
        if call in self.failing:
            raise self.failing[call]
        return Fetched(tuple(PageRun(pages, self.peer.bytes_of(pages)) for pages in ranges))


async def read_all(scheduler: Scheduler, peer: Peer, joined: Joined) -> None:
    """Overlapping readers over pages 0 to 19, each of which gets its bytes."""

    async def read(pages: PageRange) -> None:
        assert joined(await scheduler.demand(pages)) == peer.bytes_of(pages)

    async with trio.open_nursery() as readers:
        for start in range(0, 18, 2):
            readers.start_soon(read, PageRange(start, 3))


@pytest.mark.parametrize("temporary", [True, False])
async def test_failing_the_nth_fetch_for_every_n(
    autojump_clock: MockClock, nursery: trio.Nursery, peer: Peer, joined: Joined, temporary: bool
) -> None:
    for nth in range(1, 100):
        error = ServerUnreachableError("away") if temporary else ServerRefusedError("no")
        source, sink = FailingSource(peer, {nth: error}), MemorySink(peer.ram)
        scheduler = Scheduler(source, sink, nursery, budget=Budget(max_demand_requests=2))
        await read_all(scheduler, peer, joined)
        await scheduler.wait_kept()
        assert_empty(scheduler)
        if nth > source.calls:
            break
    else:
        raise AssertionError("the source was called more than 100 times")
    assert nth > 3


async def test_failing_the_nth_keep_for_every_n(
    autojump_clock: MockClock, nursery: trio.Nursery, peer: Peer, joined: Joined
) -> None:
    class FailingSink(MemorySink):
        failing = 0
        calls = 0

        async def keep(self, fetched: Fetched) -> None:
            self.calls += 1
            await trio.lowlevel.checkpoint()
            if self.calls == self.failing:
                raise StoreError("disk")
            await super().keep(fetched)

    for nth in range(1, 100):
        sink = FailingSink(peer.ram)
        sink.failing = nth
        scheduler = Scheduler(FailingSource(peer, {}), sink, nursery, budget=Budget(max_demand_requests=2))
        await read_all(scheduler, peer, joined)
        await scheduler.wait_kept()
        assert_empty(scheduler)
        if sink.calls < nth:
            break
    assert nth > 1


async def test_cancelling_at_each_wait_leaves_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery, peer: Peer, joined: Joined
) -> None:
    source, sink = FailingSource(peer, {}), MemorySink(peer.ram)
    scheduler = Scheduler(source, sink, nursery, budget=Budget(max_demand_requests=2))
    for step in range(60):
        with trio.move_on_after(step * 0.001):
            await read_all(scheduler, peer, joined)
        await settle()
        assert source.open == 0
        await scheduler.wait_kept()
        assert_empty(scheduler)
        sink.held.clear()
    await read_all(scheduler, peer, joined)


async def test_a_source_that_brings_other_pages_is_asked_again(
    autojump_clock: MockClock, nursery: trio.Nursery, peer: Peer, joined: Joined
) -> None:
    class Wrong(FailingSource):
        calls_left = 50

        async def fetch(
            self, ranges: Sequence[PageRange], *, want_leaves: bool = False, background: bool = False
        ) -> Fetched:
            self.calls_left -= 1
            return await super().fetch([PageRange(ranges[0].start, ranges[0].count + (self.calls_left > 0))])

    scheduler = Scheduler(Wrong(peer, {}), MemorySink(peer.ram), nursery)
    assert joined(await scheduler.demand(PageRange(0, 1))) == peer.bytes_of(PageRange(0, 1))
    await scheduler.wait_kept()
    assert_empty(scheduler)


async def test_large_answers_are_verified_in_turns(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    pages = PageRange(0, RAM_PAGES)
    assert joined(await scheduler.demand(pages)) == peer.ram
    assert sink.accepted_pages == RAM_PAGES
    await scheduler.wait_kept()
    assert_empty(scheduler)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize("count", [1, 100])
async def test_a_sink_whose_disk_fails_while_it_verifies_stalls_the_reader_and_nobody_else(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, count: int
) -> None:
    """A large answer is verified in a task of its own: what escaped from there ended the mount; from a small one it
    broke the connection, and the reader waited for ever."""
    autojump_clock.autojump_threshold = 0.1  # a large answer is decoded in a thread, which the clock does not see
    scheduler = Scheduler(await network.connect(), sink, nursery)
    right = sink.accept

    def failing(fetched: Fetched) -> None:
        raise StoreError("cannot read the cache's digests")

    sink.accept = failing  # type: ignore[method-assign]
    with trio.fail_after(600):
        async with trio.open_nursery() as readers:
            readers.start_soon(scheduler.demand, PageRange(3, count))
            await trio.sleep(100)
            sink.accept = right  # type: ignore[method-assign]
        await scheduler.wait_kept()
    assert sink.held == set(range(3, 3 + count))
    assert_empty(scheduler)


@pytest.mark.parametrize("demanded", [True, False])
async def test_guesses_beside_demands_are_of_a_smaller_window(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    demanded: bool,
) -> None:
    """Rule 5: the window learns from each guess that comes whether somebody demanded a moment ago."""
    monkeypatch.setattr(scheduler_module, "DEMANDED_SECONDS", 1000.0)  # of a clock that does not stand meanwhile
    told: list[bool] = []
    last_demand = LastDemand()
    scheduler = Scheduler(await network.connect(), sink, nursery, last_demand=last_demand)
    monkeypatch.setattr(scheduler._window, "note", lambda *args: told.append(args[-1]))
    if demanded:
        await scheduler.demand(PageRange(100, 1))
    await scheduler.prefetch([PageRange(0, 8)])
    assert told
    assert set(told) == {demanded}
