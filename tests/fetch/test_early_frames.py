"""A reader is answered as soon as his own pages are here, whatever else their request asks for: of a guess that he
joined, and of what several readers wait for."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from lazymem.fetch.plan import Budget
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.messages import Encoding, Message, Pages
from tests.fetch.conftest import Joined, Network, assert_empty, settle
from tests.support.memorysink import MemorySink
from tests.support.peer import Peer, digests_of


async def test_a_read_that_joined_a_guess_waits_for_its_own_frame_only(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    """The guess is of several frames; the first one has all that the reader wants. One who comes when it is here does
    not wait at all, and one who wants pages of two frames waits for both. Nothing is asked for twice."""
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery)
    nursery.start_soon(scheduler.prefetch, [PageRange(0, 10)])
    await settle()
    (guess,) = peer.fetches
    assert guess.ranges == (PageRange(0, 10),)
    read: list[bytes] = []

    async def reader() -> None:
        read.append(joined(await scheduler.demand(PageRange(1, 1))))

    nursery.start_soon(reader)
    await settle()
    first, *rest = peer.pages(guess.id, guess.ranges, frame_pages=2)
    await peer.say(first)
    await settle()
    was_answered = read == [peer.bytes_of(PageRange(1, 1))]
    assert was_answered, "it waited for the frames of pages 2 to 9 as well"
    with trio.fail_after(0):
        assert joined(await scheduler.demand(PageRange(0, 2))) == peer.bytes_of(PageRange(0, 2))
    both: list[bytes] = []

    async def reader_of_both() -> None:
        both.append(joined(await scheduler.demand(PageRange(1, 3))))

    nursery.start_soon(reader_of_both)
    await settle()
    assert not both
    await peer.say(rest.pop(0))
    await settle()
    assert both == [peer.bytes_of(PageRange(1, 3))]
    for frame in rest:
        await peer.say(frame)
    await settle()
    await scheduler.wait_kept()
    await settle()
    assert len(peer.fetches) == 1
    assert_empty(scheduler)


class SharedRequest:
    """One request is out at a time, so the demands of `pages` travel together behind one of page 1. `read`: what their
    readers got."""

    def __init__(self, scheduler: Scheduler, peer: Peer, joined: Joined) -> None:
        self.scheduler = scheduler
        self.read: dict[int, bytes] = {}
        self._peer = peer
        self._joined = joined

    async def reader(self, page: int) -> None:
        self.read[page] = self._joined(await self.scheduler.demand(PageRange(page, 1)))

    async def send(self, nursery: trio.Nursery, *pages: int) -> list[Message]:
        """The frames of its answer."""
        peer = self._peer
        peer.answers = lambda peer, request: None
        for page in (1, *pages):
            nursery.start_soon(self.reader, page)
            await settle()
        (alone,) = peer.fetches
        for frame in peer.pages(alone.id, alone.ranges):
            await peer.say(frame)
        await settle()
        _, shared = peer.fetches
        assert shared.ranges == tuple(PageRange(page, 1) for page in sorted(pages))
        return peer.pages(shared.id, shared.ranges)


@pytest.fixture
async def shared(
    network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> SharedRequest:
    scheduler = Scheduler(await network.connect(), sink, nursery, budget=Budget(max_demand_requests=1))
    return SharedRequest(scheduler, peer, joined)


async def test_reads_that_share_a_request_wait_for_their_own_frames_only(
    autojump_clock: MockClock, peer: Peer, shared: SharedRequest, nursery: trio.Nursery, joined: Joined
) -> None:
    """Nobody waits for the other's page, nor does one who comes for a page that is here while the rest is not."""
    first, second = await shared.send(nursery, 9, 5)
    await peer.say(first)
    await settle()
    assert shared.read == {page: peer.bytes_of(PageRange(page, 1)) for page in (1, 5)}, "page 5 waited for page 9"
    with trio.fail_after(0):
        assert joined(await shared.scheduler.demand(PageRange(5, 1))) == peer.bytes_of(PageRange(5, 1))
    await peer.say(second)
    await settle()
    assert shared.read[9] == peer.bytes_of(PageRange(9, 1))
    await shared.scheduler.wait_kept()
    await settle()
    assert len(peer.fetches) == 2
    assert_empty(shared.scheduler)


async def test_a_wrong_frame_of_a_shared_request_is_asked_for_again_alone(
    autojump_clock: MockClock, peer: Peer, shared: SharedRequest, nursery: trio.Nursery
) -> None:
    """Whoever was answered before keeps what he has."""
    first, second = await shared.send(nursery, 5, 9)
    await peer.say(first)
    await settle()
    peer.answers = None
    assert isinstance(second, Pages)
    right = digests_of(peer.bytes_of(second.pages))
    await peer.say(Pages(second.id, second.pages, Encoding.RAW, b"x" * PAGE_SIZE, right, final=True))
    with trio.fail_after(60):
        while 9 not in shared.read:
            await settle()
    assert shared.read == {page: peer.bytes_of(PageRange(page, 1)) for page in (1, 5, 9)}
    assert [fetch.ranges for fetch in peer.fetches[2:]] == [(PageRange(9, 1),)]
    await shared.scheduler.wait_kept()
    await settle()
    assert_empty(shared.scheduler)


async def test_what_a_reader_was_given_is_kept_when_the_other_one_leaves(
    autojump_clock: MockClock, peer: Peer, shared: SharedRequest, sink: MemorySink, nursery: trio.Nursery
) -> None:
    """Their request goes on."""
    async with trio.open_nursery() as leaves:
        first, second = await shared.send(leaves, 5, 9)
        await peer.say(first)
        await settle()
        leaves.cancel_scope.cancel()
    await peer.say(second)
    await settle()
    await shared.scheduler.wait_kept()
    await settle()
    assert set(shared.read) == {1, 5}
    assert {1, 5, 9} <= sink.held
    assert len(peer.fetches) == 2
    assert_empty(shared.scheduler)


async def test_what_is_wrong_in_an_early_frame_is_given_to_nobody(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery, joined: Joined
) -> None:
    """It is judged before a reader gets it (rule 3), and asked for again for that reader."""
    peer.answers = lambda peer, request: None
    scheduler = Scheduler(await network.connect(), sink, nursery)
    nursery.start_soon(scheduler.prefetch, [PageRange(0, 4)])
    await settle()
    (guess,) = peer.fetches
    read: list[bytes] = []
    is_read = trio.Event()

    async def reader() -> None:
        read.append(joined(await scheduler.demand(PageRange(1, 1))))
        is_read.set()

    nursery.start_soon(reader)
    await settle()
    _, second = peer.pages(guess.id, guess.ranges, frame_pages=2)
    await peer.say(
        Pages(guess.id, PageRange(0, 2), Encoding.RAW, b"x" * 2 * PAGE_SIZE, digests_of(peer.bytes_of(PageRange(0, 2))))
    )
    await settle()
    assert not read
    peer.answers = None
    await peer.say(second)
    with trio.fail_after(60):
        await is_read.wait()
    assert read == [peer.bytes_of(PageRange(1, 1))]
