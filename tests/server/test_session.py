"""One session over a pair of sockets: how frames get to the socket, whatever it takes at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from lazymem_server.catalog import Catalog
from lazymem_server.limits import ServerLimits
from lazymem_server.output import Piece
from lazymem_server.pace import Pace
from lazymem_server.session import Session

from lazymem.digests import LEAF_PAGES
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot import reader
from lazymem.wire.codec import encode
from lazymem.wire.messages import (
    Digests,
    Error,
    ErrorCode,
    Fetch,
    FetchFlag,
    Goodbye,
    Hello,
    Level,
    Pages,
    Ping,
    Pong,
    Welcome,
)
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import ClosedByServerError, WireClient, page_bytes

PAGES = 700

SIOCOUTQ = 0x5411
SIOCOUTQNSD = 0x894B
"""Of linux/sockios.h: what the peer has not acknowledged, and of that what was not sent."""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(Path(tmp_path_factory.mktemp("session")) / "web", pages=PAGES)


@asynccontextmanager
async def session(folder: Path, take: Callable[[int], int], pace: Pace | None = None) -> AsyncIterator[WireClient]:
    """A greeted client of a session whose socket takes `take(length)` of so many bytes at once."""
    server_end, client_end = socket.socketpair()
    server_end.setblocking(False)

    def writev(fd: int, pieces: Sequence[Piece]) -> int:
        data = b"".join(pieces)
        taken = take(len(data))
        return os.write(fd, data[:taken]) if taken else 0

    with Catalog([folder]) as catalog, ThreadPoolExecutor(2) as disks, server_end, trio.fail_after(90):
        client = WireClient(trio.SocketStream(trio.socket.from_stdlib_socket(client_end)))
        served = Session(
            server_end.fileno(), catalog, ServerLimits(), disks, "test", pace or Pace(), threading.Lock(), writev
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, served, server_end)
                try:
                    assert isinstance(await client.hello(), Welcome)
                    yield client
                finally:
                    served.cut()
        finally:
            served.close()
            await client.stream.aclose()


async def run(served: Session, server_end: socket.socket) -> None:
    """As the server does it: the thread's end closes the connection."""
    await trio.to_thread.run_sync(served.run)
    server_end.close()


SOCKETS: dict[str, Callable[[int], int]] = {
    "takes all": lambda length: length,
    "takes nothing most often": lambda length: length * (random.random() < 0.1),
    "takes half": lambda length: max(1, length // 2),
    "takes one byte most often": lambda length: length if random.random() < 0.1 else 1,
    "takes what it likes": lambda length: random.randint(0, length),
}


@pytest.mark.parametrize("take", SOCKETS.values(), ids=SOCKETS)
async def test_frames_arrive_whole_and_in_order(snapshot: BuiltSnapshot, take: Callable[[int], int]) -> None:
    async with session(snapshot.folder, take) as client:
        await client.send(Fetch(1, (PageRange(0, PAGES),), FetchFlag.BACKGROUND))
        await client.send(Ping(3))
        await client.send(Fetch(2, (PageRange(5, 80),)))
        parts: dict[int, list[bytes]] = {1: [], 2: []}
        open_ids = {1, 2, 3}
        while open_ids:
            message = await client.receive()
            if isinstance(message, Pages):
                parts[message.id].append(page_bytes(message))
                if message.final:
                    open_ids.remove(message.id)
            else:
                assert message == Pong(3)
                open_ids.remove(3)
        assert b"".join(parts[1]) == snapshot.ram
        assert b"".join(parts[2]) == snapshot.ram[5 * 4096 : 85 * 4096]


@pytest.mark.parametrize("take", SOCKETS.values(), ids=SOCKETS)
async def test_a_goodbye_ends_it_after_the_last_answer(snapshot: BuiltSnapshot, take: Callable[[int], int]) -> None:
    """Whoever sends the last answer, the session ends: it once stood still when nothing went through the send task."""
    async with session(snapshot.folder, take) as client:
        await client.send(Fetch(1, (PageRange(0, PAGES),)))
        await client.send(Goodbye("done"))
        assert b"".join(page_bytes(answer) for answer in await client.answers(1)) == snapshot.ram
        with pytest.raises(ClosedByServerError):
            await client.receive()


@pytest.mark.parametrize("take", SOCKETS.values(), ids=SOCKETS)
async def test_demands_one_after_the_other(
    snapshot: BuiltSnapshot, take: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest way of a demand, and its end in the middle of a frame."""
    monkeypatch.setattr(reader, "SETTLED_NS", -1)
    async with session(snapshot.folder, take) as client:
        for page in range(0, PAGES, 7):
            count = min(1 + page % 5, PAGES - page)
            flags = FetchFlag.WANT_DIGESTS if page % 3 else FetchFlag.NONE
            *leaves, first = await client.fetch(PageRange(page, 1), flags=flags)
            assert isinstance(first, Pages)
            assert page_bytes(first) == snapshot.page(page)
            leaf = page // LEAF_PAGES
            assert leaves == ([Digests(first.id, Level.LEAF, leaf, snapshot.leaf(leaf))] if flags else [])
            data = await client.read(PageRange(page, count))
            assert data == snapshot.ram[page * PAGE_SIZE : (page + count) * PAGE_SIZE]


def test_whoever_takes_nothing_is_dropped_in_time_though_the_kernel_would_take_more(snapshot: BuiltSnapshot) -> None:
    """The kernel calls a socket writable only once half of what it may have unsent has left; it takes more before. A
    session that waited for that word, and had not tried, once had no clock on such a client."""
    limits = ServerLimits(send_seconds=0.2, max_unsent_bytes=4096)
    with Catalog([snapshot.folder]) as catalog, ThreadPoolExecutor(2) as disks, contextlib.ExitStack() as closing:
        server_end, client_end = (closing.enter_context(end) for end in unread_pair())
        served = Session(server_end.fileno(), catalog, limits, disks, "test", Pace(), threading.Lock())
        closing.callback(served.close)
        thread = threading.Thread(target=served.run)
        thread.start()
        closing.callback(thread.join)
        closing.callback(served.cut)
        client_end.sendall(encode(Hello("")))
        assert client_end.recv(1), "it is welcomed"
        fill_half(server_end)
        with contextlib.suppress(BlockingIOError):
            client_end.setblocking(False)
            while True:
                client_end.send(b"".join(encode(Ping(at)) for at in range(1, 1000)))
        thread.join(30)
        assert not thread.is_alive()


def unread_pair() -> tuple[socket.socket, socket.socket]:
    """A server's end for which the kernel takes little beyond the link's need, and a client's that holds nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client_end = socket.socket()
        client_end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client_end.connect(listener.getsockname())
        server_end = listener.accept()[0]
    server_end.setblocking(False)
    server_end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 64 * 1024)
    return server_end, client_end


def fill_half(end: socket.socket) -> None:
    """Until its peer's window is shut, it is not called writable, and would take more."""
    looking = select.poll()
    looking.register(end, select.POLLOUT)
    while looking.poll(0) or unread_bytes(end, SIOCOUTQ) != unread_bytes(end, SIOCOUTQNSD):
        if looking.poll(0):
            assert end.send(bytes(1024)) == 1024
    assert end.send(bytes(1024)) == 1024


def unread_bytes(end: socket.socket, what: int) -> int:
    found: int = struct.unpack("i", fcntl.ioctl(end, what, bytes(4)))[0]
    return found


@pytest.mark.parametrize("level", [0, 1, 3])
async def test_bulk_at_every_level(snapshot: BuiltSnapshot, level: int) -> None:
    pace = Pace(level=level, frame_pages=256)
    async with session(snapshot.folder, lambda length: length, pace) as client:
        answers = await client.fetch(PageRange(0, PAGES), flags=FetchFlag.BACKGROUND)
        assert b"".join(page_bytes(answer) for answer in answers) == snapshot.ram


async def test_who_asks_again_is_believed_that_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write through a shared map need not move the file's times: `stat` sees nothing, the client's digest does.

    So the first answer may be the wrong bytes (which its reader refuses); the second one is an error that says so.
    """
    monkeypatch.setattr(reader, "SETTLED_NS", -1)
    monkeypatch.setattr(reader, "lies_in_memory", lambda device: False)
    built = make_snapshot(tmp_path / "web", pages=64)
    number = next(n for n in range(64) if any(built.page(n)))
    spoil(built.folder / "pc.ram", number * PAGE_SIZE + 5)  # before it is opened: all times are as at its opening
    async with session(built.folder, lambda length: length) as client:
        [first] = await client.fetch(PageRange(number, 1))
        assert page_bytes(first) != built.page(number)
        for pages in (PageRange(number, 1), PageRange(number, 3)):
            answer = (await client.fetch(pages))[-1]
            assert isinstance(answer, Error)
            assert answer.code == ErrorCode.PAGE_CHANGED


def spoil(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        before = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([before[0] ^ 1]), offset)
