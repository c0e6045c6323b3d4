"""A hostile client, by a list of named attacks, and another client that is served meanwhile.

Whatever the attack, the server stays in its bounds of memory, says of each client that it drops why, in one line, and
is there when it is over. What single rules of the protocol say is in `test_hostile`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from lazymem_server.limits import ServerLimits
from lazymem_server.serving import Serving, serve

from lazymem.pages import PageRange
from lazymem.wire import limits as wire_limits
from lazymem.wire.codec import encode
from lazymem.wire.frame import HEADER, FrameType
from lazymem.wire.messages import (
    Cancel,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    Goodbye,
    Hello,
    Level,
    Message,
    Ping,
    Pong,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import ClosedByServerError, WireClient, connected, open_stream

PAGES = 1024

LIMITS = ServerLimits(farewell_seconds=1.0, max_clients=24, max_clients_per_host=16)
"""The server's own, but for what would need thousands of connections."""

IMPATIENT = {
    "connections that say nothing, as many as it takes": replace(LIMITS, handshake_seconds=4),
    "connections that never end their greeting": replace(LIMITS, handshake_seconds=4),
    "greeted connections that fall silent": replace(LIMITS, idle_seconds=4, pong_seconds=0.5),
    "half a frame, and no more of it": replace(LIMITS, idle_seconds=4, pong_seconds=0.5),
    "a reader that never drains": replace(LIMITS, send_seconds=1),
    "pings, and nobody reads the pongs": replace(LIMITS, send_seconds=1),
}
"""Where the attack is to be waited out. Long enough for the other client on a busy machine."""

MOST_PEAK_BYTES = 24 << 20
"""Of the attacks that take one place, each: half a MiB of answers that wait, a few steps of a MiB, this test's side."""

Attack = Callable[[str], Awaitable[None]]

ATTACKS: dict[str, Attack] = {}


def attack(name: str) -> Callable[[Attack], Attack]:
    def register(run: Attack) -> Attack:
        ATTACKS[name] = run
        return run

    return register


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("attacks") / "web", pages=PAGES, vmstate=b"v" * (3 << 20))


@asynccontextmanager
async def served(
    snapshot: BuiltSnapshot, limits: ServerLimits = LIMITS, learn: Path | None = None
) -> AsyncIterator[Serving]:
    async with trio.open_nursery() as nursery:
        start = partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits, learn=learn)
        serving: Serving = await nursery.start(start)
        yield serving
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def from_another_host(address: str) -> AsyncIterator[WireClient]:
    """To the server it is another one: loopback has many addresses."""
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port), local_address="127.0.0.2") as stream:
        client = WireClient(stream)
        assert isinstance(await client.hello("web"), Welcome)
        yield client


async def until_dropped(stream: trio.abc.ReceiveStream) -> bytes:
    said = b""
    with contextlib.suppress(trio.BrokenResourceError):
        while data := bytes(await stream.receive_some(1 << 16)):
            said = data
    return said


async def send_until_dropped(stream: trio.abc.Stream, data: bytes) -> None:
    """Over and over, and read nothing."""
    with contextlib.suppress(trio.BrokenResourceError):
        while True:
            await stream.send_all(data)


async def say(address: str, *messages: Message | bytes) -> bytes:
    """All at once behind a greeting; what the server said last before it ended the connection."""
    async with connected(address) as client:
        said = [message if isinstance(message, bytes) else encode(message) for message in messages]
        with contextlib.suppress(trio.BrokenResourceError):
            await client.stream.send_all(b"".join(said))
        return await until_dropped(client.stream)


# ---- connections


@attack("connections that say nothing, as many as it takes")
async def silent_connections(address: str) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(150):  # one after the other: the kernel's queue of connections is not what is attacked here
            await nursery.start(silent, address)


async def silent(address: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    async with await open_stream(address) as stream:
        task_status.started()
        await until_dropped(stream)


@attack("connections that never end their greeting")
async def endless_greetings(address: str) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(drip, address)


async def drip(address: str) -> None:
    hello = encode(Hello("x" * 255))
    async with await open_stream(address) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            for at in range(len(hello)):
                await stream.send_all(hello[at : at + 1])
                await trio.sleep(0.02)


@attack("connections that are reset at once")
async def resets(address: str) -> None:
    for _ in range(100):
        stream = await open_stream(address)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stream)


@attack("greeted connections that fall silent")
async def greeted_and_silent(address: str) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(greeted_silent, address)


async def greeted_silent(address: str) -> None:
    with contextlib.suppress(ClosedByServerError):
        async with connected(address) as client:
            await until_dropped(client.stream)


@attack("half a frame, and no more of it")
async def half_a_frame(address: str) -> None:
    whole = encode(Fetch(1, tuple(PageRange(2 * at, 1) for at in range(100))))
    assert await say(address, whole[:500]) == encode(Ping(1))


@attack("goodbyes, and what follows them")
async def goodbye_storm(address: str) -> None:
    for _ in range(30):
        await say(address, Goodbye(""), Goodbye(""), Fetch(1, (PageRange(0, 1),)))


# ---- floods


@attack("a reader that never drains")
async def never_drains(address: str) -> None:
    async with connected(address) as client:
        flood = b"".join(encode(Fetch(at, (PageRange(0, PAGES),))) for at in range(1, 129))
        await send_until_dropped(client.stream, flood)


@attack("pings, and nobody reads the pongs")
async def ping_flood(address: str) -> None:
    host, _, port = address.rpartition(":")
    inner = trio.socket.socket()
    inner.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or the kernel reads for us, megabytes
    await inner.connect((host, int(port)))
    async with trio.SocketStream(inner) as stream:
        await WireClient(stream).hello()
        await send_until_dropped(stream, b"".join(encode(Ping(at)) for at in range(1, 2000)))


@attack("endless small frames, each of them allowed")
async def small_frames(address: str) -> None:
    async with connected(address) as client:
        flood = b"".join(encode(Cancel(at)) for at in range(1, 5000)) + encode(Ping(1))
        for _ in range(2):
            await client.stream.send_all(flood)
            assert await client.stream.receive_some(1 << 16) == encode(Pong(1))


@attack("requests that are cancelled at once")
async def cancel_storm(address: str) -> None:
    async with connected(address) as client:
        for _ in range(10):
            ids = [client.next_id() for _ in range(60)]
            for number in ids:
                await client.send(Fetch(number, (PageRange(0, PAGES),), FetchFlag.BACKGROUND))
                await client.send(Cancel(number))
            while client.connection.open_requests:
                await client.receive()


@attack("the whole RAM and its digests, as often as may be open")
async def huge_requests(address: str) -> None:
    async with connected(address) as client:
        flags = FetchFlag.BACKGROUND | FetchFlag.WANT_DIGESTS
        for _ in range(40):
            await client.send(Fetch(client.next_id(), (PageRange(0, PAGES),), flags))
        for _ in range(40):
            await client.send(FetchDigests(client.next_id(), Level.LEAF, 0, PAGES // 256))
        for _ in range(40):
            await client.send(ReadFile(client.next_id(), PublishedFile.VMSTATE, 0, 1 << 20))
        await client.receive()


@attack("many thin ranges, each a page")
async def thin_ranges(address: str) -> None:
    async with connected(address) as client:
        most = client.welcome.limits.max_request_ranges
        ranges = tuple(PageRange(at * (PAGES // most), 1) for at in range(most))
        for _ in range(client.welcome.limits.max_requests // 8):
            await client.send(Fetch(client.next_id(), ranges, FetchFlag.BACKGROUND))
        with contextlib.suppress(ClosedByServerError), trio.fail_after(60):
            while client.connection.open_requests:
                await client.receive()


@attack("the longest frames, and no frame of that length is legal")
async def longest_headers(address: str) -> None:
    for kind in FrameType:
        said = await say(address, HEADER.pack((1 << 32) - 1, kind, 0, 0, 1) + bytes(4096))
        assert is_fatal(said, ErrorCode.BAD_REQUEST)


# ---- names and places


NAMES = ["..", ".", "nobody", "web ", "WEB", "%2e%2e", "~", "web%00", "-", "$(id)", "x" * 255]


@attack("names that are no snapshot's")
async def unknown_names(address: str) -> None:
    for name in NAMES:
        async with await open_stream(address) as stream:
            answer = await WireClient(stream).hello(name)
            assert isinstance(answer, Error)
            assert answer.code in (ErrorCode.NO_SUCH_SNAPSHOT, ErrorCode.BAD_REQUEST)


PATHS = [b"../web", b"/etc/passwd", b"web/../web", b"a/b", b"web\0", b"\0", b"we\nb", b"\xff\xfe", b"\xed\xa0\x80"]
PATHS += ["\u202ebew".encode(), b"web\x1b[2J"]


@attack("paths and tricks in names")
async def path_tricks(address: str) -> None:
    hello = encode(Hello(""))[HEADER.size :]
    for name in PATHS:
        async with await open_stream(address) as stream:
            await stream.send_all(HEADER.pack(len(hello) + len(name), FrameType.HELLO, 0, 0, 0) + hello + name)
            said = await until_dropped(stream)
            assert is_fatal(said, ErrorCode.BAD_REQUEST), (name, said)
            assert b"\x1b" not in said


BEYOND: dict[str, Message | bytes] = {
    "a page": Fetch(1, (PageRange(PAGES, 1),)),
    "a range that ends outside": Fetch(1, (PageRange(PAGES - 1, 2),)),
    "the last page number of all": Fetch(1, (PageRange(wire_limits.MAX_PAGES - 1, 1),)),
    "a range that wraps around": HEADER.pack(12, FrameType.FETCH, 0, 0, 1) + struct.pack("<QI", 2**64 - 1, 2),
    "a leaf": FetchDigests(1, Level.LEAF, PAGES // 256, 1),
    "leaf digests": FetchDigests(1, Level.UPPER, 0, PAGES // 256 + 1),
    "a leaf that wraps around": HEADER.pack(16, FrameType.FETCH_DIGESTS, 0, 0, 1)
    + struct.pack("<IIQ", 0, 4096, 2**64 - 1),
    "a file's offset": HEADER.pack(16, FrameType.READ_FILE, 0, 0, 1) + struct.pack("<IIQ", 1, 1, 2**64 - 1),
    "a file's length": HEADER.pack(16, FrameType.READ_FILE, 0, 0, 1) + struct.pack("<IIQ", 1, 2**32 - 1, 0),
    "a file that there is not": HEADER.pack(16, FrameType.READ_FILE, 0, 0, 1) + struct.pack("<IIQ", 7, 1, 0),
    "a level that there is not": HEADER.pack(16, FrameType.FETCH_DIGESTS, 0, 0, 1) + struct.pack("<IIQ", 7, 1, 0),
    "a file to be stored, which nobody wants": StoreFile(1, PublishedFile.WORKING_SET, 0, 1, b"x"),
}


@attack("what lies beyond the image")
async def beyond(address: str) -> None:
    for what, request in BEYOND.items():
        said = await say(address, request)
        assert is_fatal(said, ErrorCode.BAD_REQUEST), what


@attack("beyond a file's end, which is no breach")
async def beyond_a_file(address: str) -> None:
    async with connected(address) as client:
        for offset in (3 << 20, wire_limits.MAX_FILE_OFFSET):
            answer = await client.read_file(PublishedFile.VMSTATE, offset, 1 << 20)
            assert not answer.data  # type: ignore[union-attr]


def is_fatal(said: bytes, code: ErrorCode) -> bool:
    """Whether the last that the server said is one ERROR about the connection, of one printable line."""
    at = 0
    while at + HEADER.size <= len(said):
        length, kind, _, _, request_id = HEADER.unpack_from(said, at)
        if kind == FrameType.ERROR and not request_id:
            (found,) = struct.unpack_from("<H", said, at + HEADER.size)
            text = said[at + HEADER.size + 4 : at + HEADER.size + length].decode()
            return found == code and text.isprintable() and 0 < len(text) < 200
        at += HEADER.size + length
    return False


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack(snapshot: BuiltSnapshot, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lazymem.server")
    async with served(snapshot, IMPATIENT.get(name, LIMITS)) as serving:
        gc.collect()
        tracemalloc.start()
        try:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ATTACKS[name], serving.addresses[0])
                    async with from_another_host(serving.addresses[0]) as client:
                        for page in range(0, PAGES, 100):
                            assert await client.read(PageRange(page, 1)) == snapshot.page(page)
                await wait_left(serving)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        async with connected(serving.addresses[0]) as client:
            assert await client.read(PageRange(7, 1)) == snapshot.page(7)
    assert peak < MOST_PEAK_BYTES, f"{peak >> 20} MiB"
    assert all(record.exc_info is None and "\n" not in record.getMessage() for record in caplog.records)


async def wait_left(serving: Serving) -> None:
    while serving.clients:
        await trio.lowlevel.checkpoint()


# ---- a learning server


async def test_uploads_stay_in_their_bounds(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Pieces that do not follow each other, of a file that does not end, of one that is none: nothing is kept."""
    async with served(snapshot, learn=tmp_path / "learned") as serving:
        for total, offset, data in ((1 << 20, 4096, b"x"), (5, 0, b"abcde"), (1 << 20, 0, b"y" * 12000)):
            async with await open_stream(serving.addresses[0]) as stream:
                other = WireClient(stream)
                assert isinstance(await other.hello("web"), Welcome)
                await other.send(StoreFile(1, PublishedFile.WORKING_SET, offset, total, data))
                answer = await other.receive()
                assert isinstance(answer, Error) is (total != 1 << 20 or offset != 0), answer
    assert not list((tmp_path / "learned").iterdir())
