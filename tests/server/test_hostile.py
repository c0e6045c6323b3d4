"""Clients that are slow, silent, greedy or speak nonsense: each is limited or dropped, and another client is served.

Bounds are in the server's own terms: bytes it holds or sends to others meanwhile, connections it keeps.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from lazymem_server.jobs import FetchJob
from lazymem_server.limits import ServerLimits
from lazymem_server.serving import Serving, serve

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot.reader import SnapshotReader, VouchedRun
from lazymem.wire.codec import encode
from lazymem.wire.frame import HEADER
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchFlag,
    Hello,
    Pages,
    Ping,
    Pong,
)
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import WireClient, connected, open_stream, page_bytes, small_client

PAGES = 4096

BRIEF = ServerLimits(farewell_seconds=0.05)

PATIENCE_SECONDS = 60.0
"""On a busy machine, for what takes milliseconds."""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("hostile") / "web", pages=PAGES)


@asynccontextmanager
async def served(snapshot: BuiltSnapshot, limits: ServerLimits | None = None) -> AsyncIterator[Serving]:
    async with trio.open_nursery() as nursery:
        start = partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits)
        serving: Serving = await nursery.start(start)
        yield serving
        nursery.cancel_scope.cancel()


async def assert_another_is_served(serving: Serving, snapshot: BuiltSnapshot) -> None:
    """A well-behaved client comes, reads 20 pages one by one, and goes, in seconds."""
    with trio.fail_after(PATIENCE_SECONDS):
        async with connected(serving.addresses[0]) as client:
            for page in range(0, PAGES, PAGES // 20):
                assert await client.read(PageRange(page, 1)) == snapshot.page(page)


async def assert_dropped(stream: trio.SocketStream) -> bytes:
    """The server ends the stream; what it had said before."""
    said = b""
    with trio.fail_after(PATIENCE_SECONDS), contextlib.suppress(trio.BrokenResourceError):
        while data := bytes(await stream.receive_some(65536)):
            said += data
    return said


async def wait_clients(serving: Serving, count: int) -> None:
    with trio.fail_after(PATIENCE_SECONDS):
        while serving.clients != count:
            await trio.lowlevel.checkpoint()


NONSENSE = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "random": os.urandom(5000),
    "zeros": bytes(5000),
    "oversized": HEADER.pack(2**32 - 1, 1, 0, 0, 0),
    "a server's frame": encode(Pages(1, PageRange(0, 1), Encoding.ZERO)),
    "a request before the greeting": encode(Fetch(1, (PageRange(0, 1),))),
    "wrong magic": encode(Hello("web")).replace(b"lazymem", b"LAZYMEM"),
}

NONSENSE_AFTER = {
    "a second greeting": encode(Hello("web")),
    "random": os.urandom(5000),
    "beyond the RAM": encode(Fetch(1, (PageRange(PAGES, 1),))),
    "far beyond the RAM": encode(Fetch(1, (PageRange((1 << 34) - 1, 1),))),
    "too many pages": encode(Fetch(1, (PageRange(0, 1 << 20),))),
    "too many ranges": encode(Fetch(1, tuple(PageRange(2 * at, 1) for at in range(1000)))),
    "an id in use": encode(Fetch(1, (PageRange(0, PAGES),))) + encode(Fetch(1, (PageRange(0, 1),))),
    "too many requests": b"".join(encode(Fetch(at, (PageRange(0, PAGES),))) for at in range(1, 200)),
    "a pong to nothing": encode(Pong(1)),
    "an oversized frame": HEADER.pack(2**31, 3, 0, 0, 1),
    "a range of nothing": HEADER.pack(12, 3, 0, 0, 1) + struct.pack("<QI", 0, 0),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_instead_of_a_greeting(snapshot: BuiltSnapshot, name: str) -> None:
    async with served(snapshot, ServerLimits(farewell_seconds=PATIENCE_SECONDS)) as serving:
        async with await open_stream(serving.addresses[0]) as stream:
            await stream.send_all(NONSENSE[name])
            said = await assert_dropped(stream)
        assert HEADER.unpack_from(said)[1:] == (11, 0, 0, 0)  # one ERROR about the connection
        assert struct.unpack_from("<H", said, HEADER.size) == (ErrorCode.BAD_REQUEST,)
        await assert_another_is_served(serving, snapshot)
        await wait_clients(serving, 0)


@pytest.mark.parametrize("name", NONSENSE_AFTER)
async def test_nonsense_after_the_greeting(snapshot: BuiltSnapshot, name: str) -> None:
    async with served(snapshot, BRIEF) as serving, connected(serving.addresses[0]) as client:
        await client.stream.send_all(NONSENSE_AFTER[name])
        assert isinstance(client.stream, trio.SocketStream)
        await assert_dropped(client.stream)
        await assert_another_is_served(serving, snapshot)
        await wait_clients(serving, 0)


async def test_a_fatal_error_says_what_was_wrong(snapshot: BuiltSnapshot) -> None:
    async with served(snapshot) as serving, connected(serving.addresses[0]) as client:
        await client.stream.send_all(NONSENSE_AFTER["beyond the RAM"])
        answer = await client.receive()
        assert isinstance(answer, Error)
        assert (answer.id, answer.code) == (0, ErrorCode.BAD_REQUEST)
        assert f"page {PAGES + 1} of {PAGES}" in answer.text


async def test_silence_instead_of_a_greeting(snapshot: BuiltSnapshot) -> None:
    async with served(snapshot, ServerLimits(handshake_seconds=0.05)) as serving:
        async with await open_stream(serving.addresses[0]) as stream:
            assert await assert_dropped(stream) == b""
        await wait_clients(serving, 0)


async def test_half_a_greeting(snapshot: BuiltSnapshot) -> None:
    async with served(snapshot, ServerLimits(handshake_seconds=0.05)) as serving:
        async with await open_stream(serving.addresses[0]) as stream:
            await stream.send_all(encode(Hello("web"))[:-1])
            assert await assert_dropped(stream) == b""
        await wait_clients(serving, 0)


async def test_a_greeting_byte_by_byte(snapshot: BuiltSnapshot) -> None:
    """It is not the silence that is bounded, but the time to the last byte."""
    async with served(snapshot, ServerLimits(handshake_seconds=0.2)) as serving:
        async with await open_stream(serving.addresses[0]) as stream:
            hello = encode(Hello("x" * 255))
            with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(PATIENCE_SECONDS):
                while hello:
                    await stream.send_all(hello[:1])
                    hello = hello[1:]
                    await trio.sleep(0.01)
            assert hello, "2.8 s, and it was still listened to"
        await wait_clients(serving, 0)


async def test_a_client_that_died_without_a_word(snapshot: BuiltSnapshot) -> None:
    """It was greeted, then nothing: it is asked, and dropped when it does not answer."""
    async with served(snapshot, ServerLimits(idle_seconds=0.05, pong_seconds=0.1)) as serving:
        async with connected(serving.addresses[0]) as client:
            assert await client.receive() == Ping(1)  # which may have come with the welcome
            assert isinstance(client.stream, trio.SocketStream)
            assert await assert_dropped(client.stream) == b""
        await wait_clients(serving, 0)


async def test_a_quiet_client_that_answers_stays(snapshot: BuiltSnapshot) -> None:
    limits = ServerLimits(idle_seconds=0.02, pong_seconds=30)
    async with served(snapshot, limits) as serving, connected(serving.addresses[0]) as client:
        for _ in range(3):
            assert await client.receive() == Ping(1)
            await client.send(Pong(1))


async def test_a_client_that_does_not_read(snapshot: BuiltSnapshot) -> None:
    """The server holds a bounded part of its answers, reads no more of its requests, and drops it in time."""
    limits = ServerLimits(send_seconds=0.5)
    async with served(snapshot, limits) as serving, small_client(serving.addresses[0]) as client:
        with contextlib.suppress(trio.BrokenResourceError):  # dropped already
            for _ in range(100):
                await client.send(Fetch(client.next_id(), (PageRange(0, PAGES),)))
        await assert_another_is_served(serving, snapshot)
        await wait_clients(serving, 0)
        assert serving.counters.bytes_sent < 8 << 20


async def test_a_client_that_reads_slowly_is_served_on(snapshot: BuiltSnapshot) -> None:
    async with served(snapshot) as serving, small_client(serving.addresses[0]) as client:
        await client.send(Fetch(1, (PageRange(0, 1024),)))
        await assert_another_is_served(serving, snapshot)
        assert len(await client.answers(1)) > 1


async def test_a_flood_of_pings_that_nobody_reads_the_answers_of(snapshot: BuiltSnapshot) -> None:
    """Pongs wait in bounded memory; then the server stops reading, and the flood stands in the client's own socket."""
    limits = ServerLimits(send_seconds=0.5, max_unsent_bytes=4096)
    async with served(snapshot, limits) as serving:
        async with small_client(serving.addresses[0]) as client:
            flood = b"".join(encode(Ping(at)) for at in range(1, 1000))
            with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(PATIENCE_SECONDS):
                while True:
                    await client.stream.send_all(flood)
        await assert_another_is_served(serving, snapshot)
        await wait_clients(serving, 0)


async def test_greedy_clients_cost_another_one_little(snapshot: BuiltSnapshot) -> None:
    """Eight clients read everything over and over; one asks for single pages, and mostly has each before the others
    have got, together, as much as one of their requests brings."""
    greeds = [Greed() for _ in range(8)]
    async with served(snapshot) as serving, trio.open_nursery() as nursery:
        async with connected(serving.addresses[0]) as client:
            await client.send(Fetch(1, (PageRange(0, PAGES),)))
            whole_bytes = sum(len(encode(message)) for message in await client.answers(1))
        for greed in greeds:
            await nursery.start(greed.run, serving.addresses[0])
        async with connected(serving.addresses[0]) as client:
            meanwhile = []
            for page in range(50):
                before = sum(greed.received_bytes for greed in greeds)
                assert await client.read(PageRange(page, 1)) == snapshot.page(page)
                meanwhile.append(sum(greed.received_bytes for greed in greeds) - before)
        with trio.fail_after(PATIENCE_SECONDS):
            while not all(greed.received_bytes for greed in greeds):  # noqa: ASYNC110  # served, if not as soon
                await trio.sleep(0.01)
        assert all(greed.received_bytes < greed.requests * whole_bytes for greed in greeds), "and not done"
        nursery.cancel_scope.cancel()
    assert sorted(meanwhile)[len(meanwhile) // 2] < whole_bytes, meanwhile


class Greed:
    """A client that asks for all pages as often as it may."""

    def __init__(self) -> None:
        self.requests = self.received_bytes = 0

    async def run(self, address: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with connected(address) as client:
            for _ in range(client.welcome.limits.max_requests):
                await client.send(Fetch(client.next_id(), (PageRange(0, PAGES),)))
                self.requests += 1
            await client.receive()
            task_status.started()
            while True:
                self.received_bytes += len(await client.stream.receive_some(1 << 20))


async def test_demand_overtakes_the_same_clients_guesses(snapshot: BuiltSnapshot) -> None:
    """16 MiB of guesses are asked for first; the demanded page comes with a bounded part of them before it."""
    async with served(snapshot) as serving, connected(serving.addresses[0]) as client:
        await client.send(Fetch(1, (PageRange(0, PAGES),), FetchFlag.BACKGROUND))
        await client.receive()
        await client.send(Fetch(2, (PageRange(9, 1),)))
        before = 0
        while (message := await client.receive()) and getattr(message, "id", 0) != 2:
            before += len(message.data) if isinstance(message, Pages) else 0
        assert isinstance(message, Pages)
        # What this process and the kernel of either side held when the demand came; the rest of 16 MiB is behind it.
        assert before < 8 << 20


async def test_too_many_clients_are_told(snapshot: BuiltSnapshot) -> None:
    async with served(snapshot, ServerLimits(max_clients=2)) as serving:
        address = serving.addresses[0]
        async with connected(address), connected(address), await open_stream(address) as stream:
            answer = await WireClient(stream).hello()
            assert isinstance(answer, Error)
            assert (answer.id, answer.code) == (0, ErrorCode.BUSY)
        await wait_clients(serving, 0)
        await assert_another_is_served(serving, snapshot)


async def test_one_host_cannot_take_all_places(snapshot: BuiltSnapshot) -> None:
    async with served(snapshot, ServerLimits(max_clients_per_host=1)) as serving:
        address = serving.addresses[0]
        async with connected(address), await open_stream(address) as stream:
            answer = await WireClient(stream).hello()
            assert isinstance(answer, Error)
            assert answer.code == ErrorCode.BUSY


async def test_a_client_that_vanishes_in_the_middle(snapshot: BuiltSnapshot) -> None:
    async with served(snapshot) as serving:
        for cut in (1, 20, 40):
            async with connected(serving.addresses[0]) as client:
                await client.send(Fetch(1, (PageRange(0, PAGES),)))
                await client.receive()
                await client.stream.send_all(encode(Fetch(2, (PageRange(0, 1), PageRange(4, 1))))[:cut])
        await wait_clients(serving, 0)
        await assert_another_is_served(serving, snapshot)


async def test_a_cold_disk_under_one_client_does_not_stop_another(
    snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages from 2048 on are on a disk that answers when the test says so; the others are in memory."""
    disk_answers = threading.Event()
    read_nowait, read_some = SnapshotReader.read_nowait, SnapshotReader.read_some

    def cold_nowait(self: SnapshotReader, pages: PageRange, **how: bool) -> object:
        return None if pages.start >= 2048 else read_nowait(self, pages, **how)

    def cold_read(self: SnapshotReader, pages: PageRange, most: int) -> list[VouchedRun]:
        assert disk_answers.wait(60)
        return read_some(self, pages, most)

    monkeypatch.setattr(SnapshotReader, "read_nowait", cold_nowait)
    monkeypatch.setattr(SnapshotReader, "read_into_nowait", lambda self, *place: None)
    monkeypatch.setattr(SnapshotReader, "read_some", cold_read)
    async with served(snapshot) as serving, connected(serving.addresses[0]) as waiting, finally_set(disk_answers):
        await waiting.send(Fetch(1, (PageRange(3000, 1),)))
        await waiting.send(Fetch(2, (PageRange(3001, 1),), FetchFlag.BACKGROUND))
        await waiting.send(Fetch(3, (PageRange(7, 1),)))
        [hot] = await waiting.answers(3)
        assert page_bytes(hot) == snapshot.page(7)
        with trio.fail_after(PATIENCE_SECONDS):
            async with connected(serving.addresses[0]) as client:
                assert await client.read(PageRange(0, 100)) == snapshot.ram[: 100 * PAGE_SIZE]
        disk_answers.set()
        rest = [await waiting.receive(), await waiting.receive()]
        assert {message.id for message in rest if isinstance(message, Pages)} == {1, 2}


@asynccontextmanager
async def finally_set(event: threading.Event) -> AsyncIterator[None]:
    """A test that fails must not leave a server's thread waiting."""
    try:
        yield
    finally:
        event.set()


async def test_a_cancelled_cold_read_ends_with_cancelled(
    snapshot: BuiltSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, disk_answers = threading.Event(), threading.Event()

    def cold_read(self: SnapshotReader, pages: PageRange, most: int) -> list[VouchedRun]:
        at_work.set()
        assert disk_answers.wait(60)
        return []

    monkeypatch.setattr(SnapshotReader, "read_nowait", lambda self, pages, **how: None)
    monkeypatch.setattr(SnapshotReader, "read_into_nowait", lambda self, *place: None)
    monkeypatch.setattr(SnapshotReader, "read_some", cold_read)
    monkeypatch.setattr(FetchJob, "_answers", lambda self, leaf, runs: [])
    async with served(snapshot) as serving, connected(serving.addresses[0]) as client, finally_set(disk_answers):
        await client.send(Fetch(1, (PageRange(5, 1),)))
        assert await trio.to_thread.run_sync(at_work.wait, 60)
        await client.send(Cancel(1))
        await client.send(Ping(1))
        assert await client.receive() == Pong(1)  # the CANCEL was read, the disk is still at work
        disk_answers.set()
        assert await client.receive() == Cancelled(1)
