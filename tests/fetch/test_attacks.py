"""A hostile server, by a list of named attacks, over real sockets.

Its first connection attacks, the later ones are honest. The client ends the hostile one, in one line and in bounded
memory, and its readers get right bytes from the next; never wrong bytes, never an error, and no reader of other pages
minds. What single answers against the protocol do is in `test_hostile_peers`, other RAM at the same address in
`test_client`.
"""

from __future__ import annotations

import contextlib
import gc
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import zstandard

from lazymem.errors import VerificationError
from lazymem.fetch import session
from lazymem.fetch.client import connect
from lazymem.fetch.scheduler import Scheduler
from lazymem.pages import PAGE_SIZE, PageRange, PageRun
from lazymem.settings import LinkSettings, ServerAddress, parse_endpoint
from lazymem.wire.codec import encode
from lazymem.wire.connection import NEED_DATA, ServerConnection
from lazymem.wire.frame import HEADER, FrameType
from lazymem.wire.messages import (
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    Goodbye,
    Hello,
    Message,
    Pages,
    Ping,
    Pong,
)
from tests.support.memorysink import MemorySink
from tests.support.peer import Peer, digests_of, make_ram

PAGES = PageRange(256, 256)
OTHERS = PageRange(8, 3)

LINK = LinkSettings(backoff_base_seconds=0.01, backoff_cap_seconds=0.05)

MOST_PEAK_BYTES = 16 << 20
"""A leaf's pages, compressed and not, what waits in the receive buffer, and this side of the test."""

Attack = Callable[[Peer, trio.SocketStream, Fetch], Awaitable[None]]

ATTACKS: dict[str, Attack] = {}


def attack(name: str) -> Callable[[Attack], Attack]:
    """What is done instead of an answer to the fetch of `PAGES`; the connection is closed behind it."""

    def register(run: Attack) -> Attack:
        ATTACKS[name] = run
        return run

    return register


def _bomb() -> bytes:
    honest = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(PAGES.length_bytes))
    more = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
    return honest[: zstandard.frame_header_size(honest)] + more[zstandard.frame_header_size(more) :]


BOMB = _bomb()


class Hostile:
    """Attacks its first connection that fetches `PAGES`, and is honest to all later ones."""

    def __init__(self, name: str) -> None:
        self.peer = Peer(make_ram(1024))
        self.attacked = 0
        self.dials = 0
        self._attack = ATTACKS[name]

    async def serve(self, stream: trio.SocketStream) -> None:
        self.dials += 1
        if self.attacked:
            await self.peer.serve(stream)
            return
        connection = ServerConnection()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                while True:
                    event = connection.next_event()
                    if event is NEED_DATA:
                        connection.receive_data(bytes(await stream.receive_some(65536)))
                    elif isinstance(event, Fetch) and event.ranges[0].start >= PAGES.start:
                        self.attacked += 1
                        await self._attack(self.peer, stream, event)
                        return
                    elif isinstance(event, Hello):
                        await stream.send_all(connection.send(self.peer.welcome(event)))
                    elif isinstance(event, Fetch):
                        for answer in self.peer.honest(event):
                            await stream.send_all(connection.send(answer))
                    else:
                        return


@asynccontextmanager
async def listening(
    serve: Callable[[trio.SocketStream], Awaitable[None]],
) -> AsyncIterator[tuple[ServerAddress, trio.Nursery]]:
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        host, port = listener.socket.getsockname()
        yield ServerAddress(parse_endpoint(f"{host}:{port}")), nursery
        nursery.cancel_scope.cancel()


async def forever(stream: trio.SocketStream, data: bytes) -> None:
    while True:
        await stream.send_all(data)


def zstd_pages(fetch: Fetch, data: bytes) -> bytes:
    """An answer with any bytes called compressed."""
    pages = fetch.ranges[0]
    return encode(Pages(fetch.id, pages, Encoding.ZSTD, data, bytes(16) * pages.count, final=True))


# ---- floods


@attack("pings without end, whose pongs nobody reads")
async def pings(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await forever(stream, b"".join(encode(Ping(at)) for at in range(1, 4000)))


@attack("pings and goodbyes without end")
async def goodbyes(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await forever(stream, encode(Goodbye("I am ending")) * 1000)


@attack("pongs that answer nothing")
async def pongs(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await forever(stream, b"".join(encode(Pong(at)) for at in range(1, 1000)))


@attack("the same page for ever")
async def one_page(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await forever(stream, encode(peer.frame(fetch.id, PageRange(PAGES.start, 1), final=False)))


@attack("noise without end")
async def noise(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await forever(stream, bytes(range(1, 256)) * 257)


@attack("the longest frame, and none of it")
async def longest(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await stream.send_all(HEADER.pack(2**32 - 1, FrameType.PAGES, 1, 0, fetch.id))
    await stream.receive_some(1)


@attack("errors that end nothing")
async def errors(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await forever(stream, encode(Error(fetch.id + 7, ErrorCode.IO_ERROR, "x" * 1000)))


@attack("an error with a terminal's control characters, that ends the connection")
async def escapes(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    text = b"\x1b[2J\x1b]0;gone\x07\r\n" * 20
    await stream.send_all(HEADER.pack(4 + len(text), FrameType.ERROR, 0, 0, 0) + struct.pack("<HH", 202, 0) + text)
    await stream.receive_some(1)


async def refuses(peer: Peer, stream: trio.SocketStream, fetch: Fetch, code: ErrorCode) -> None:
    await stream.send_all(encode(Error(fetch.id, code, "no")))
    await stream.receive_some(1 << 16)  # the client asks once more
    await stream.send_all(encode(Error(fetch.id + 1, code, "no")))
    await stream.receive_some(1)


for _code in ErrorCode:
    ATTACKS[f"a FETCH answered with {_code.name}"] = partial(refuses, code=_code)


# ---- bombs


@attack("a compressed bomb: a small frame that says it holds 4 GiB")
async def says_much(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    head = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 4 << 30)
    await stream.send_all(zstd_pages(fetch, head + b"\x03\x00\x00\x00"))
    await stream.receive_some(1)


@attack("a compressed bomb: it says a MiB and holds 64 of them")
async def holds_much(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await stream.send_all(zstd_pages(fetch, BOMB))
    await stream.receive_some(1)


@attack("a compressed bomb: a window of 2 GiB")
async def wide_window(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    size = struct.pack("<Q", fetch.ranges[0].length_bytes)
    await stream.send_all(zstd_pages(fetch, b"\x28\xb5\x2f\xfd\xc0" + bytes([21 << 3]) + size + b"\x03\x00\x00\x00"))
    await stream.receive_some(1)


@attack("a compressed bomb: many frames in one")
async def many_frames(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    one = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(fetch.ranges[0].length_bytes))
    await stream.send_all(zstd_pages(fetch, one * 100))
    await stream.receive_some(1)


# ---- wrong bytes


async def lies(peer: Peer, stream: trio.SocketStream, fetch: Fetch, frames: list[Message]) -> None:
    for message in frames:
        await stream.send_all(encode(message))
    await stream.receive_some(1 << 16)  # the client asks once more
    again: list[Message] = [_with_id(message, fetch.id + 1) for message in frames]
    for message in again:
        await stream.send_all(encode(message))
    await stream.receive_some(1)


def _with_id(message: Message, request_id: int) -> Message:
    assert isinstance(message, Pages)
    return Pages(request_id, message.pages, message.encoding, message.data, message.digests, message.final)


def _raw(request_id: int, pages: PageRange, data: bytes, digests: bytes) -> Pages:
    return Pages(request_id, pages, Encoding.RAW, data, digests, final=True)


@attack("wrong bytes, with the right digests")
async def wrong_bytes(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    right = peer.bytes_of(PAGES)
    await lies(peer, stream, fetch, [_raw(fetch.id, PAGES, right[::-1], digests_of(right))])


@attack("right bytes, with wrong digests")
async def wrong_digests(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    right = peer.bytes_of(PAGES)
    await lies(peer, stream, fetch, [_raw(fetch.id, PAGES, right, digests_of(right[::-1]))])


@attack("zeros instead of pages")
async def zeros(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    await lies(peer, stream, fetch, [Pages(fetch.id, PAGES, Encoding.ZERO, final=True)])


@attack("the bytes of other pages")
async def other_pages(peer: Peer, stream: trio.SocketStream, fetch: Fetch) -> None:
    elsewhere = peer.bytes_of(PageRange(PAGES.start + 1, PAGES.count))
    await lies(peer, stream, fetch, [_raw(fetch.id, PAGES, elsewhere, digests_of(elsewhere))])


class VouchedSink(MemorySink):
    """Also compares the digests that come along, as the store does."""

    def accept(self, fetched: object) -> None:
        for start, digests in fetched.page_digests.items():  # type: ignore[attr-defined]
            count = len(digests) // 16
            if digests != digests_of(self.ram[start * PAGE_SIZE : (start + count) * PAGE_SIZE]):
                raise VerificationError(f"pages from {start} on have other digests")
        super().accept(fetched)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_UNSENT_BYTES", 1 << 20)
    hostile = Hostile(name)
    got: list[list[PageRun]] = []
    gc.collect()
    async with listening(hostile.serve) as (address, nursery):
        client = await connect(nursery, address, LINK)
        scheduler = Scheduler(client, VouchedSink(hostile.peer.ram), nursery)
        assert joined(await scheduler.demand(OTHERS)) == hostile.peer.bytes_of(OTHERS)
        tracemalloc.start()
        try:
            with trio.fail_after(60):
                got.append(await scheduler.demand(PAGES))
                more = PageRange(OTHERS.start + 100, 2)
                assert joined(await scheduler.demand(more)) == hostile.peer.bytes_of(more)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        client.close()
    [answer] = got
    assert joined(answer) == hostile.peer.bytes_of(PAGES)
    assert hostile.attacked == 1
    if "nobody reads" in name:  # the kernel would end it too, after seconds in which it costs whatever it costs
        assert "the server does not read what it is sent" in caplog.text
    assert peak < MOST_PEAK_BYTES, f"{peak >> 20} MiB"
    assert all(record.getMessage().isprintable() and record.exc_info is None for record in caplog.records)


def joined(found: list[PageRun]) -> bytes:
    return b"".join(bytes(run.pages.length_bytes) if run.data is None else bytes(run.data) for run in found)
