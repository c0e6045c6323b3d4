"""One session over memory streams: how frames get to the socket, whatever the socket takes at once."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from lazymem_server.catalog import Catalog
from lazymem_server.limits import ServerLimits
from lazymem_server.session import Counters, Session

from lazymem.pages import PageRange
from lazymem.wire.messages import Fetch, FetchFlag, Goodbye, Pages, Ping, Pong, Welcome
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import ClosedByServerError, WireClient, page_bytes

PAGES = 700


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(Path(tmp_path_factory.mktemp("session")) / "web", pages=PAGES)


@asynccontextmanager
async def session(snapshot: BuiltSnapshot, take: Callable[[int], int]) -> AsyncIterator[WireClient]:
    """A greeted client of a session whose socket takes `take(length)` of so many bytes without waiting."""
    client_end, server_end = trio.testing.memory_stream_pair()

    def send_nowait(data: bytes) -> int:
        taken = take(len(data))
        client_end.receive_stream.put_data(data[:taken])
        return taken

    with Catalog([snapshot.folder]) as catalog, trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            threads = trio.CapacityLimiter(2)
            served = Session(server_end, catalog, ServerLimits(), threads, Counters(), "test", send_nowait)
            nursery.start_soon(served.run)
            client = WireClient(client_end)
            assert isinstance(await client.hello(), Welcome)
            yield client
            await client_end.aclose()


SOCKETS: dict[str, Callable[[int], int]] = {
    "takes all": lambda length: length,
    "takes nothing": lambda length: 0,
    "takes half": lambda length: length // 2,
    "takes one byte": lambda length: 1,
    "takes what it likes": lambda length: random.randint(0, length),
}


@pytest.mark.parametrize("take", SOCKETS.values(), ids=SOCKETS)
async def test_frames_arrive_whole_and_in_order(snapshot: BuiltSnapshot, take: Callable[[int], int]) -> None:
    async with session(snapshot, take) as client:
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
    async with session(snapshot, take) as client:
        await client.send(Fetch(1, (PageRange(0, PAGES),)))
        await client.send(Goodbye("done"))
        assert b"".join(page_bytes(answer) for answer in await client.answers(1)) == snapshot.ram
        with pytest.raises(ClosedByServerError):
            await client.receive()
