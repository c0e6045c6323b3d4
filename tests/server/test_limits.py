"""Each bound of `ServerLimits` has a test that meets it: here, or in the test that `ELSEWHERE` names."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.limits import ServerLimits
from lazymem_server.listeners import tune
from lazymem_server.output import Lane, Output
from lazymem_server.pace import Pace
from lazymem_server.serving import Serving, serve

from lazymem.pages import PageRange
from lazymem.snapshot.reader import SnapshotReader, VouchedRun
from lazymem.wire.messages import Encoding, Fetch, FetchFlag, Pages, Ping, Pong
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import WireClient, connected, small_client

PAGES = 2048

ELSEWHERE = {
    "max_clients": "test_hostile.py::test_too_many_clients_are_told",
    "max_clients_per_host": "test_hostile.py::test_one_host_cannot_take_all_places",
    "handshake_seconds": "test_hostile.py::test_a_greeting_byte_by_byte",
    "max_handshakes": "test_strangers.py::test_a_crowd_in_its_handshakes_keeps_nobody_out",
    "idle_seconds": "test_hostile.py::test_a_quiet_client_that_answers_stays",
    "pong_seconds": "test_hostile.py::test_a_client_that_died_without_a_word",
    "send_seconds": "test_hostile.py::test_a_client_that_does_not_read",
    "max_unsent_bytes": "test_hostile.py::test_a_flood_of_pings_that_nobody_reads_the_answers_of",
    "max_requests": "test_hostile.py::test_nonsense_after_the_greeting",
    "max_request_ranges": "test_hostile.py::test_nonsense_after_the_greeting",
    "max_request_pages": "test_hostile.py::test_nonsense_after_the_greeting",
    "farewell_seconds": "test_attacks.py::test_attack",
    "max_farewells": "test_crowds.py::test_a_crowd_that_is_refused_is_not_told_so_one_by_one",
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("limits") / "web", pages=PAGES)


@asynccontextmanager
async def served(snapshot: BuiltSnapshot, limits: ServerLimits) -> AsyncIterator[Serving]:
    async with trio.open_nursery() as nursery:
        serving: Serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits))
        yield serving
        nursery.cancel_scope.cancel()


def test_every_limit_has_a_test() -> None:
    here = Path(__file__).read_text()
    for field in dataclasses.fields(ServerLimits):
        if field.name not in ELSEWHERE:
            assert f"def test_{field.name}" in here
            continue
        name, test = ELSEWHERE[field.name].split("::")
        assert f"def {test}(" in Path(__file__).with_name(name).read_text()


async def test_demand_frame_pages(snapshot: BuiltSnapshot) -> None:
    limits = ServerLimits(demand_frame_pages=4)
    async with served(snapshot, limits) as serving, connected(serving.addresses[0]) as client:
        answers = await client.fetch(PageRange(0, 100))
    frames = [answer for answer in answers if isinstance(answer, Pages) and answer.encoding != Encoding.ZERO]
    assert max(frame.pages.count for frame in frames) == 4


class Disk:
    """Reads that wait until they may go on, and how many did at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers = threading.Event()
        self.most = self.now = self.most_pages = 0
        self._lock = threading.Lock()
        self._read = SnapshotReader.read_some
        monkeypatch.setattr(SnapshotReader, "read_nowait", lambda reader, pages, **how: None)
        monkeypatch.setattr(SnapshotReader, "read_into_nowait", lambda reader, *place: None)
        monkeypatch.setattr(SnapshotReader, "read_some", lambda *arguments: self._wait(*arguments))

    def _wait(self, reader: SnapshotReader, pages: PageRange, most: int) -> list[VouchedRun]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.most_pages = max(self.most_pages, most)
        assert self.answers.wait(60)
        with self._lock:
            self.now -= 1
        return self._read(reader, pages, most)

    async def wait_for(self, reads: int) -> None:
        with trio.fail_after(30):
            while self.now < reads:
                await trio.lowlevel.checkpoint()


@contextmanager
def cold_disk() -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        try:
            yield disk
        finally:
            disk.answers.set()


async def ask(client: WireClient, count: int, flags: FetchFlag = FetchFlag.NONE) -> None:
    for _ in range(count):
        request_id = client.next_id()
        await client.send(Fetch(request_id, (PageRange(10 * request_id, 2),), flags))


async def read(client: WireClient) -> None:
    """The server has handled all that was sent before."""
    await client.send(Ping(1))
    assert await client.receive() == Pong(1)


async def test_max_cold_reads(snapshot: BuiltSnapshot) -> None:
    """And of guesses one."""
    with cold_disk() as disk:
        limits = ServerLimits(max_cold_reads=3)
        async with served(snapshot, limits) as serving, connected(serving.addresses[0]) as client:
            await ask(client, 5, FetchFlag.BACKGROUND)
            await disk.wait_for(1)
            await read(client)
            assert disk.most == 1
            await ask(client, 6)
            await disk.wait_for(3)
            await read(client)
            assert disk.most == 3
            disk.answers.set()
            while client.connection.open_requests:
                await client.receive()
    assert disk.most == 3


async def test_max_threads(snapshot: BuiltSnapshot) -> None:
    with cold_disk() as disk:
        async with AsyncExitStack() as opened:
            serving = await opened.enter_async_context(served(snapshot, ServerLimits(max_threads=2)))
            clients = [await opened.enter_async_context(connected(serving.addresses[0])) for _ in range(2)]
            for client in clients:
                await ask(client, 3)
                await read(client)
            await disk.wait_for(2)
            disk.answers.set()
            for client in clients:
                while client.connection.open_requests:
                    await client.receive()
    assert disk.most == 2


async def test_cold_read_pages(snapshot: BuiltSnapshot) -> None:
    with cold_disk() as disk:
        disk.answers.set()
        limits = ServerLimits(cold_read_pages=5)
        async with served(snapshot, limits) as serving, connected(serving.addresses[0]) as client:
            await client.fetch(PageRange(0, 40), flags=FetchFlag.BACKGROUND)
    assert disk.most_pages == 5


@asynccontextmanager
async def deaf_client(serving: Serving) -> AsyncIterator[WireClient]:
    """Asked for all of the RAM as a guess, and reads nothing of it; its socket holds next to nothing."""
    async with small_client(serving.addresses[0]) as client:
        await client.send(Fetch(1, (PageRange(0, PAGES),), FetchFlag.BACKGROUND))
        yield client


async def test_max_background_unsent_bytes(snapshot: BuiltSnapshot) -> None:
    """With the one frame that came last: of guesses no more is made."""
    async with served(snapshot, ServerLimits(max_background_unsent_bytes=4096)) as serving, deaf_client(serving):
        with trio.fail_after(30):
            while not (unsent := [each._outlet.unsent_bytes for each in serving._sessions if each._steps.has_waiting]):
                await trio.lowlevel.checkpoint()
            before = -1
            while unsent != [before] or not before:
                before = unsent[0]
                await trio.sleep(0.1)
                unsent = [session._outlet.unsent_bytes for session in serving._sessions]
    assert 0 < before < 4096 + (1 << 20)


async def test_goodbye_seconds(snapshot: BuiltSnapshot) -> None:
    """A client that does not take its answers holds no server's end up."""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            limits = ServerLimits(goodbye_seconds=0.2)
            serving: Serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits))
            async with deaf_client(serving):
                serving.stop()
                while serving.clients:
                    await trio.lowlevel.checkpoint()


def test_send_bytes() -> None:
    output = Output()
    for _ in range(10):
        output.put((bytes(1000),), Lane.BACKGROUND)
    assert sum(map(len, output.pieces(3000))) == 3000


async def test_over_a_slow_link_demands_come_in_frames_that_are_short_there(
    snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernel gets less at a time: what it has, nothing overtakes."""
    allowed: list[int] = []
    monkeypatch.setattr("lazymem_server.serving.allow_unsent", lambda stream, count: allowed.append(count))
    async with served(snapshot, ServerLimits()) as serving:
        slow = Pace(level=0, frame_pages=3, unsent_bytes=8192)
        monkeypatch.setattr(serving, "_pace", lambda host: slow)
        async with connected(serving.addresses[0]) as client:
            answers = await client.fetch(PageRange(0, 100))
            lone = await client.fetch(PageRange(100, 20))
    for frames in (answers, lone):
        counts = [found.pages.count for found in frames if isinstance(found, Pages) and found.encoding != Encoding.ZERO]
        assert max(counts) == 3
    assert allowed == [8192]


async def test_socket_unsent_bytes() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await trio.open_tcp_stream(*listener.socket.getsockname()) as stream:
        tune(stream, 12345)
        assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 12345
