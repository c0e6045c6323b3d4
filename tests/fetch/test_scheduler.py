"""The scheduler between readers, a source and a sink: rules 3, 4, 5, and what is left behind."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from lazymem.fetch.prefetch import SweepPrefetcher
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PageRange
from tests.fetch.conftest import Joined, Network
from tests.support.memorysink import MemorySink
from tests.support.peer import RAM_PAGES, Peer, is_background


@pytest.fixture
def sink(peer: Peer) -> MemorySink:
    return MemorySink(peer.ram)


async def test_demand_brings_pages_and_keeps_them(
    network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    pages = PageRange(3, 20)
    assert joined(await scheduler.demand(pages)) == peer.bytes_of(pages)
    await scheduler.wait_kept()
    assert sink.held == set(range(3, 23))
    statistics = scheduler.statistics()
    assert (statistics.demand_faults, statistics.demand_pages, statistics.unkept_pages) == (1, 20, 0)
    assert statistics.in_flight_pages == 0
    assert statistics.link is not None
    assert statistics.link.connected
    nursery.cancel_scope.cancel()


async def test_prefetch_all_brings_everything_and_stops(
    network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    client = await network.connect()
    scheduler = Scheduler(client, sink, nursery, prefetcher=SweepPrefetcher(sink.next_missing, RAM_PAGES))
    await trio.testing.wait_all_tasks_blocked(0.01)
    while len(sink.held) < RAM_PAGES:
        await trio.testing.wait_all_tasks_blocked(0.01)
    await scheduler.wait_kept()
    asked = sum(pages.count for fetch in peer.fetches for pages in fetch.ranges)
    assert asked == RAM_PAGES
    assert all(is_background(fetch) for fetch in peer.fetches)
    assert not scheduler.statistics().prefetching
    nursery.cancel_scope.cancel()
