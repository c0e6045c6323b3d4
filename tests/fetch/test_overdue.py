"""Guesses that a reader waits for and that stand still: their pages are asked for as demands, before long."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from lazymem.fetch.overdue import ANSWERS, LEAST_SECONDS
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.messages import Fetch, Message
from tests.fetch.conftest import Joined, Network
from tests.support.memorysink import MemorySink
from tests.support.peer import Peer, is_background

GUESS = PageRange(64, 10)
"""One request of the first window."""


class KeepsGuessesBack:
    """A server that answers demands only. `wrong`: so many of them with other bytes."""

    def __init__(self, wrong: int = 0) -> None:
        self.guesses: list[Fetch] = []
        self.demands: list[list[PageRange]] = []
        self._wrong = wrong

    def __call__(self, peer: Peer, request: Message) -> Sequence[Message] | None:
        assert isinstance(request, Fetch)
        if is_background(request):
            self.guesses.append(request)
            return None
        self.demands.append(list(request.ranges))
        if len(self.demands) <= self._wrong:
            return Peer(bytes(reversed(peer.ram))).honest(request)
        return peer.honest(request)

    async def guess(self, scheduler: Scheduler, nursery: trio.Nursery) -> None:
        nursery.start_soon(scheduler.prefetch, [GUESS])
        await trio.testing.wait_all_tasks_blocked()
        (guess,) = self.guesses
        assert guess.ranges == (GUESS,)

    async def let_come(self, peer: Peer) -> None:
        for answer in peer.honest(self.guesses[0]):
            await peer.say(answer, 1)
        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
def server(peer: Peer) -> KeepsGuessesBack:
    peer.answers = KeepsGuessesBack()
    return peer.answers


async def test_a_reader_waits_for_a_guess_that_stands_still_for_a_moment_only(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    started = trio.current_time()
    pages = PageRange(70, 2)
    assert joined(await scheduler.demand(pages)) == peer.bytes_of(pages)
    assert trio.current_time() - started == pytest.approx(LEAST_SECONDS)
    assert server.demands == [[pages]], "no page that nobody waits for"
    await server.let_come(peer)
    await scheduler.wait_kept()
    assert sink.held == set(range(GUESS.start, GUESS.end))
    assert not scheduler._flights
    assert not len(scheduler._table)


async def test_all_readers_of_a_guess_are_asked_for_at_once(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    """Also one that reaches beyond it, whose other pages are a demand as usual."""
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    wanted = [PageRange(64, 2), PageRange(65, 2), PageRange(70, 1), PageRange(72, 8)]
    async with trio.open_nursery() as readers:

        async def read(pages: PageRange) -> None:
            assert joined(await scheduler.demand(pages)) == peer.bytes_of(pages)

        for pages in wanted:
            readers.start_soon(read, pages)
    assert [PageRange(74, 6)] in server.demands
    server.demands.remove([PageRange(74, 6)])
    assert server.demands == [[PageRange(64, 3), PageRange(70, 1), PageRange(72, 2)]]


async def test_a_guess_that_comes_in_time_is_asked_for_once(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    read: list[bytes] = []

    async def reader() -> None:
        read.append(joined(await scheduler.demand(PageRange(70, 1))))

    nursery.start_soon(reader)
    await trio.sleep(LEAST_SECONDS * 0.9)
    assert not read
    await server.let_come(peer)
    assert read == [peer.bytes_of(PageRange(70, 1))]
    await trio.sleep(100 * LEAST_SECONDS)
    assert server.demands == []


async def test_a_second_answer_that_is_wrong_is_given_to_nobody(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    server = peer.answers = KeepsGuessesBack(wrong=2)
    client = await network.connect()
    doubts: list[str] = []
    client.doubt = doubts.append  # type: ignore[method-assign, assignment]
    scheduler = Scheduler(client, sink, nursery)
    await server.guess(scheduler, nursery)
    assert joined(await scheduler.demand(PageRange(70, 1))) == peer.bytes_of(PageRange(70, 1))
    assert server.demands == [[PageRange(70, 1)]] * 3
    assert doubts == ["wrong bytes"], "as of any demand, at the second time"


async def test_who_joins_while_it_is_asked_for_again_waits_for_that(
    autojump_clock: MockClock, network: Network, peer: Peer, sink: MemorySink, nursery: trio.Nursery
) -> None:
    """Then what was not asked for with it is, once."""
    server, answered = KeepsGuessesBack(), trio.Event()

    def slowly(peer: Peer, request: Message) -> Sequence[Message] | None:
        answers = server(peer, request)
        return answers if answered.is_set() or is_background(request) else None  # type: ignore[arg-type]

    peer.answers = slowly
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    nursery.start_soon(scheduler.demand, PageRange(70, 1))
    await trio.sleep(2 * LEAST_SECONDS)
    for page in (70, 71, 72):
        nursery.start_soon(scheduler.demand, PageRange(page, 1))
    await trio.sleep(10 * LEAST_SECONDS)
    assert server.demands == [[PageRange(70, 1)]]
    answered.set()
    (first,) = [fetch for fetch in peer.fetches if not is_background(fetch)]
    for answer in peer.honest(first):
        await peer.say(answer, 0)
    await trio.sleep(2 * LEAST_SECONDS)
    assert server.demands == [[PageRange(70, 1)], [PageRange(71, 2)]]


async def test_a_reader_that_is_gone_asks_for_nothing(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    with trio.move_on_after(LEAST_SECONDS / 2):
        await scheduler.demand(PageRange(70, 1))
    await trio.sleep(100 * LEAST_SECONDS)
    assert server.demands == []


async def test_over_a_slow_link_a_guess_has_as_long_as_some_answers_take(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    scheduler = Scheduler(await network.connect(), sink, nursery)
    scheduler._overdue._answer_seconds = lambda: LEAST_SECONDS
    await server.guess(scheduler, nursery)
    started = trio.current_time()
    assert len(joined(await scheduler.demand(PageRange(70, 1)))) == PAGE_SIZE
    assert trio.current_time() - started == pytest.approx(ANSWERS * LEAST_SECONDS)


async def test_what_came_of_a_guess_is_not_asked_for_again(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    """Two of the reader's pages are in a frame that came, and two in the next one."""
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    pages = PageRange(66, 4)
    read: list[bytes] = []

    async def reader() -> None:
        read.append(joined(await scheduler.demand(pages)))

    async with trio.open_nursery() as readers:
        readers.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        await peer.say(peer.pages(server.guesses[0].id, (GUESS,), frame_pages=4)[0], 1)
    assert read == [peer.bytes_of(pages)]
    assert server.demands == [[PageRange(68, 2)]]


async def test_a_frame_that_comes_behind_the_second_answer_is_not_given_twice(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    """Both have page 67. A reader that got it from each had bytes of other pages behind it."""
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    assert joined(await scheduler.demand(PageRange(67, 2))) == peer.bytes_of(PageRange(67, 2))
    frames = peer.pages(server.guesses[0].id, (GUESS,), frame_pages=4)
    await peer.say(frames[0], 1)
    await trio.testing.wait_all_tasks_blocked()
    assert joined(await scheduler.demand(PageRange(65, 4))) == peer.bytes_of(PageRange(65, 4))
    assert len(server.demands) == 1


async def test_a_guess_may_land_before_its_watch_has_its_turn(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    server: KeepsGuessesBack,
    sink: MemorySink,
    nursery: trio.Nursery,
    joined: Joined,
) -> None:
    """A reader joins it, and its answer is read, in one pass of the loop. That ended the mount."""
    scheduler = Scheduler(await network.connect(), sink, nursery)
    await server.guess(scheduler, nursery)
    (flight,) = set(scheduler._flights.values())
    scheduler._overdue.wait_for(flight)
    scheduler._overdue.landed(flight)
    await trio.testing.wait_all_tasks_blocked()
    started = trio.current_time()
    assert joined(await scheduler.demand(PageRange(70, 1))) == peer.bytes_of(PageRange(70, 1))
    assert trio.current_time() - started == pytest.approx(LEAST_SECONDS)
