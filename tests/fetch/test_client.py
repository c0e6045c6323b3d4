"""The client against peers over memory streams: what it asks, what it makes of answers, how it survives losses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from lazymem.errors import (
    LazymemError,
    LocalProtocolError,
    RemoteProtocolError,
    ServerRefusedError,
    ServerUnreachableError,
    VerificationError,
)
from lazymem.fetch.client import Client
from lazymem.pages import PageRange
from lazymem.settings import LinkSettings
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Error,
    ErrorCode,
    Fetch,
    Goodbye,
    Limits,
    Message,
    Pages,
    PublishedFile,
    ReadFile,
)
from tests.fetch.conftest import Joined, Network
from tests.support.peer import Peer, is_background, make_ram


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


# ---- what it asks


async def test_fetch_brings_exactly_the_asked_pages(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    client = await network.connect()
    ranges = [PageRange(0, 1), PageRange(5, 100), PageRange(511, 1)]
    fetched = await client.fetch(ranges)
    assert fetched.runs[0].pages == PageRange(0, 1)
    assert joined(fetched.runs) == b"".join(peer.bytes_of(pages) for pages in ranges)
    assert len(peer.fetches) == 1
    digests = fetched.page_digests
    assert all(run.data is None or len(digests[run.pages.start]) == 16 * run.pages.count for run in fetched.runs)


async def test_large_fetches_are_cut_to_the_servers_limits(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    peer.limits = Limits(max_request_pages=7, max_request_ranges=2, max_requests=3)
    client = await network.connect()
    ranges = [PageRange(0, 30), *(PageRange(page, 1) for page in range(40, 60, 2))]
    fetched = await client.fetch(ranges)
    assert joined(fetched.runs) == b"".join(peer.bytes_of(pages) for pages in ranges)
    assert [run.pages.start for run in fetched.runs] == sorted(run.pages.start for run in fetched.runs)
    assert len(peer.fetches) > 5


async def test_never_more_requests_open_than_allowed(autojump_clock: MockClock, network: Network, peer: Peer) -> None:
    """The peer's own connection would call a fourth one a breach, and end."""
    peer.limits = Limits(256, 64, max_requests=3)
    open_requests: list[Message] = []

    def hold(peer: Peer, request: Message) -> None:
        open_requests.append(request)

    peer.answers = hold
    client = await network.connect()
    async with trio.open_nursery() as readers:
        for page in range(10):
            readers.start_soon(client.fetch, [PageRange(page, 1)])
        for answered in range(10):
            await settle()
            assert len(peer.fetches) == min(10, 3 + answered)
            request = open_requests.pop(0)
            await peer.say(peer.honest(request)[0])


async def test_guesses_have_a_connection_of_their_own_and_are_marked(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    client = await network.connect()
    assert len(peer.hellos) == 1
    await client.fetch([PageRange(0, 1)], background=True)
    await client.fetch([PageRange(1, 1)])
    assert len(peer.hellos) == 2
    assert [is_background(fetch) for fetch in peer.fetches] == [True, False]


async def test_the_guesses_connection_may_be_made_before_there_is_a_guess(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    client = await network.connect()
    client.connect_for_guesses()
    await settle()
    assert len(peer.hellos) == 2
    await client.fetch([PageRange(0, 1)], background=True)
    assert len(peer.hellos) == 2


async def test_published_files_come_whole_and_only_within_the_limit(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    peer.vmstate = bytes(range(256)) * 10000
    client = await network.connect()
    assert await client.read_file(PublishedFile.VMSTATE, 1 << 30) == peer.vmstate
    assert len(peer.requests) == 3
    with pytest.raises(ServerRefusedError, match="more than 100"):
        await client.read_file(PublishedFile.VMSTATE, 100)
    assert await client.read_file(PublishedFile.WORKING_SET, 100) == b""


async def test_published_file_that_ends_early_is_an_error(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    client = await network.connect()
    peer.vmstate = peer.vmstate[:-1]
    with pytest.raises(RemoteProtocolError, match="before its size"):
        await client.read_file(PublishedFile.VMSTATE, 1 << 30)


async def test_cancelled_fetch_is_cancelled_at_the_server_and_the_rest_goes_on(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    peer.answers = lambda peer, request: None
    client = await network.connect()
    with trio.move_on_after(1):
        await client.fetch([PageRange(0, 1)])
    await settle()
    assert peer.requests == [Fetch(1, (PageRange(0, 1),)), Cancel(1)]
    peer.answers = None
    assert joined((await client.fetch([PageRange(0, 1)])).runs) == peer.bytes_of(PageRange(0, 1))
    assert client.statistics().open_requests == 0


async def test_answer_that_crossed_a_cancel_is_dropped(autojump_clock: MockClock, network: Network, peer: Peer) -> None:
    peer.answers = lambda peer, request: None
    client = await network.connect()
    with trio.move_on_after(1):
        await client.fetch([PageRange(0, 4)])
    await settle()
    assert not peer.connections[0].is_open(1)  # the peer said Cancelled already
    with trio.move_on_after(1) as scope:
        async with trio.open_nursery() as readers:
            readers.start_soon(client.fetch, [PageRange(0, 4)])
            await settle()
            await peer.say(peer.pages(2, [PageRange(0, 4)], frame_pages=2)[0])
            await settle()
            scope.cancel()
    await settle()
    assert isinstance(peer.requests[-1], Cancel)
    peer.answers = None
    assert len((await client.fetch([PageRange(0, 4)])).runs) >= 1
    assert network.dials == 1


async def test_request_that_breaks_the_protocol_fails_alone(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    client = await network.connect()
    with pytest.raises(LocalProtocolError):
        await client.fetch([PageRange(10_000, 1)])
    await client.fetch([PageRange(0, 1)])
    assert client.statistics().open_requests == 0
    assert network.dials == 1


# ---- errors that the server says


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ErrorCode.PAGE_CHANGED, VerificationError),
        (ErrorCode.BAD_REQUEST, LocalProtocolError),
        (ErrorCode.NO_SUCH_FILE, ServerRefusedError),
    ],
)
async def test_errors_for_good_reach_the_caller(
    autojump_clock: MockClock, network: Network, peer: Peer, code: ErrorCode, expected: type[LazymemError]
) -> None:
    peer.answers = lambda peer, request: [Error(request.id, code, "because")]  # type: ignore[union-attr]
    client = await network.connect()
    with pytest.raises(expected, match="because"):
        await client.fetch([PageRange(0, 1)])
    assert client.statistics().open_requests == 0


@pytest.mark.parametrize(
    "code", [ErrorCode.IO_ERROR, ErrorCode.BUSY, ErrorCode.SHUTTING_DOWN, ErrorCode.TOO_MANY_REQUESTS]
)
async def test_errors_that_may_pass_are_waited_for(
    autojump_clock: MockClock,
    network: Network,
    peer: Peer,
    joined: Joined,
    code: ErrorCode,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(peer: Peer, request: Message) -> Sequence[Message]:
        if len(peer.fetches) < 20:
            return [Error(request.id, code, "not now")]  # type: ignore[union-attr]
        return peer.honest(request)

    peer.answers = refuse
    client = await network.connect()
    pages = PageRange(0, 8)
    assert joined((await client.fetch([pages])).runs) == peer.bytes_of(pages)
    assert network.dials == 1
    assert [record.message for record in caplog.records] == [
        "demand connection: a request is refused for now and tried again: not now"
    ]


async def test_part_that_is_refused_for_now_costs_no_page_twice(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    peer.limits = Limits(max_request_pages=4, max_request_ranges=4, max_requests=8)

    def refuse_one(peer: Peer, request: Message) -> Sequence[Message]:
        assert isinstance(request, Fetch)
        if len(peer.fetches) == 2:
            return [Error(request.id, ErrorCode.IO_ERROR, "bad sector")]
        return peer.honest(request)

    peer.answers = refuse_one
    client = await network.connect()
    pages = PageRange(0, 8)
    assert joined((await client.fetch([pages])).runs) == peer.bytes_of(pages)
    assert [fetch.ranges for fetch in peer.fetches] == [(PageRange(0, 4),), (PageRange(4, 4),), (PageRange(4, 4),)]


# ---- the first connection


async def test_nobody_there_is_an_error_at_once(autojump_clock: MockClock, network: Network) -> None:
    network.peer = None
    with pytest.raises(ServerUnreachableError, match=r"ram\.example:7411"):
        await network.connect()
    assert network.dials == 1


@pytest.mark.parametrize("code", [ErrorCode.NO_SUCH_SNAPSHOT, ErrorCode.UNSUPPORTED_VERSION])
async def test_refusal_for_good_is_an_error_at_once(
    autojump_clock: MockClock, network: Network, code: ErrorCode
) -> None:
    network.peer = Refusing(code, times=1000)
    with pytest.raises(ServerRefusedError, match=r"ram\.example:7411: the server says: sorry"):
        await network.connect()
    assert network.dials == 1


async def test_full_server_is_asked_again_for_a_while(autojump_clock: MockClock, network: Network) -> None:
    network.peer = Refusing(ErrorCode.BUSY, times=3)
    await network.connect()
    assert network.dials == 4


async def test_server_that_stays_full_is_an_error(autojump_clock: MockClock, network: Network) -> None:
    network.peer = Refusing(ErrorCode.BUSY, times=100_000)
    started_at = trio.current_time()
    with pytest.raises(ServerRefusedError, match="sorry"):
        await network.connect()
    assert 10 <= trio.current_time() - started_at <= 20


class Refusing(Peer):
    """Refuses the first `times` connections."""

    def __init__(self, code: ErrorCode, times: int) -> None:
        super().__init__(make_ram())
        self.code = code
        self.times = times

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.times -= 1
        if self.times < 0:
            await super().serve(stream)
            return
        self.connections.append(self.new_connection())
        self.streams.append(stream)
        await self.say(Error(0, self.code, "sorry"))
        await stream.aclose()


# ---- a connection that goes away


async def test_requests_survive_a_lost_connection(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined, caplog: pytest.LogCaptureFixture
) -> None:
    peer.answers = lambda peer, request: None
    client = await network.connect()
    results: list[bytes] = []

    async def read(pages: PageRange) -> None:
        results.append(joined((await client.fetch([pages])).runs))

    async with trio.open_nursery() as readers:
        for page in range(5):
            readers.start_soon(read, PageRange(page, 1))
        await settle()
        peer.answers = None
        network.peer = None
        await network.cut()
        await trio.sleep(3600)
        assert not results
        assert "trying to reconnect for 3600 s: ram.example:7411: connection refused" in client.statistics().connection
        assert not client.statistics().connected
        network.peer = peer
    assert sorted(results) == sorted(peer.bytes_of(PageRange(page, 1)) for page in range(5))
    assert client.statistics().reconnects == 1
    assert client.statistics().connected
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3, messages  # lost; the reason changed; back
    assert messages[-1].startswith("demand connection is back after 36")


async def test_after_a_loss_only_what_has_not_come_is_asked_again(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    client = await network.connect()
    peer.answers = lambda peer, request: peer.pages(request.id, request.ranges, frame_pages=3)[:2]  # type: ignore[union-attr]
    result: list[bytes] = []

    async def read() -> None:
        result.append(joined((await client.fetch([PageRange(0, 4), PageRange(10, 6)])).runs))

    async with trio.open_nursery() as readers:
        readers.start_soon(read)
        await settle()
        peer.answers = None
        await network.cut()
    assert peer.fetches[1].ranges == (PageRange(10, 6),)
    assert result == [peer.bytes_of(PageRange(0, 4)) + peer.bytes_of(PageRange(10, 6))]


async def test_limits_that_shrank_after_a_loss_are_kept_to(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    peer.answers = lambda peer, request: None
    client = await network.connect()
    result: list[bytes] = []

    async def read() -> None:
        result.append(joined((await client.fetch([PageRange(0, 20)])).runs))

    async with trio.open_nursery() as readers:
        readers.start_soon(read)
        await settle()
        peer.answers = None
        peer.limits = Limits(4, 1, 2)
        await network.cut()
    assert result == [peer.bytes_of(PageRange(0, 20))]


async def test_other_ram_at_the_address_is_refused_until_the_old_is_back(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined, caplog: pytest.LogCaptureFixture
) -> None:
    client = await network.connect()
    network.peer = replace(peer, identity=b"\1" * 32, ram=make_ram(), requests=[])
    await network.cut()
    result: list[bytes] = []

    async def read() -> None:
        result.append(joined((await client.fetch([PageRange(0, 1)])).runs))

    async with trio.open_nursery() as readers:
        readers.start_soon(read)
        await trio.sleep(600)
        assert network.peer.requests == []
        assert not result
        network.peer = peer
    assert result == [peer.bytes_of(PageRange(0, 1))]
    assert sum("another snapshot" in record.message for record in caplog.records) == 1


async def test_silent_server_is_noticed_within_seconds(autojump_clock: MockClock, network: Network, peer: Peer) -> None:
    link = LinkSettings()
    client = await network.connect(link)
    peer.pong = False
    started_at = trio.current_time()
    await network.dialled(2)
    assert trio.current_time() - started_at < link.ping_interval_seconds + link.ping_timeout_seconds + 1
    assert client.statistics().reconnects <= 1


async def test_quiet_but_living_server_is_left_alone(autojump_clock: MockClock, network: Network, peer: Peer) -> None:
    peer.answers = lambda peer, request: None
    client = await network.connect()
    with trio.move_on_after(3600):
        await client.fetch([PageRange(0, 1)])
    assert network.dials == 1


async def test_goodbye_lets_open_requests_finish_and_takes_new_ones_elsewhere(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    peer.answers = lambda peer, request: None
    client = await network.connect()
    results: list[bytes] = []

    async def read(page: int) -> None:
        results.append(joined((await client.fetch([PageRange(page, 1)])).runs))

    async with trio.open_nursery() as readers:
        readers.start_soon(read, 1)
        await settle()
        await peer.say(Goodbye("restart"))
        await settle()
        readers.start_soon(read, 2)
        await settle()
        assert len(peer.fetches) == 1
        peer.answers = None
        await peer.say(peer.honest(peer.fetches[0])[0])
    assert results == [peer.bytes_of(PageRange(1, 1)), peer.bytes_of(PageRange(2, 1))]
    assert network.dials == 2
    assert client.statistics().reconnects == 1


async def test_promoted_guess_changes_the_lane_when_the_background_connection_is_refused(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined
) -> None:
    client = await network.connect()
    network.peer = Refusing(ErrorCode.BUSY, times=100_000)
    done: list[object] = []
    handle = client.start_fetch([PageRange(0, 2)], want_leaves=False, background=True, on_done=done.append)
    await trio.sleep(60)
    assert not done
    handle.promote(PageRange(0, 1), lambda part: None)
    await settle()
    assert len(done) == 1
    assert [is_background(fetch) for fetch in peer.fetches] == [False]


async def test_promoted_guess_changes_the_lane_when_its_connection_is_lost(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    client = await network.connect()
    peer.answers = lambda peer, request: None
    done: list[object] = []
    handle = client.start_fetch([PageRange(0, 2)], want_leaves=False, background=True, on_done=done.append)
    await settle()
    handle.promote(PageRange(0, 1), lambda part: None)
    assert [is_background(fetch) for fetch in peer.fetches] == [True]
    peer.answers = None
    await network.lines.pop().aclose()
    await settle()
    assert len(done) == 1
    assert [is_background(fetch) for fetch in peer.fetches] == [True, False]


async def test_close_ends_every_task(
    autojump_clock: MockClock, network: Network, peer: Peer, nursery: trio.Nursery
) -> None:
    client = await network.connect()
    await client.fetch([PageRange(0, 1)], background=True)
    client.close()
    await settle()
    assert len(nursery.child_tasks) == 0
    with trio.move_on_after(1) as scope:
        await client.fetch([PageRange(0, 1)])
    assert scope.cancelled_caught


async def test_nothing_is_delivered_after_cancel_not_even_from_a_thread(
    autojump_clock: MockClock, network: Network, peer: Peer
) -> None:
    peer.ram = bytes(range(1, 65)) * (len(peer.ram) // 64)
    client: Client = await network.connect()
    done: list[object] = []
    handle = client.start_fetch([PageRange(0, 256)], want_leaves=False, background=False, on_done=done.append)
    while client.statistics().open_requests:
        await trio.lowlevel.checkpoint()
    handle.cancel()
    await trio.to_thread.run_sync(lambda: None)
    await settle()
    assert done == []
    fetched = await client.fetch([PageRange(0, 256)])
    assert sum(run.pages.count for run in fetched.runs) == 256
    assert not any(isinstance(request, Cancelled | ReadFile | Pages) for request in peer.requests)


async def test_a_host_without_threads_decodes_all_the_same(
    autojump_clock: MockClock, network: Network, peer: Peer, joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a large guess would end the client, and the mount with it."""

    async def run_sync(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    peer.ram = bytes(range(1, 65)) * (len(peer.ram) // 64)
    client = await network.connect()
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    fetched = await client.fetch([PageRange(0, 256)])
    assert joined(fetched.runs) == peer.bytes_of(PageRange(0, 256))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
