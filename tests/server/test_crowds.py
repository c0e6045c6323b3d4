"""More connections than the server has room for: it goes on, and whoever is in is served."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import partial

import pytest
import trio
from lazymem_server.limits import ServerLimits
from lazymem_server.serving import Serving, serve

from lazymem.pages import PageRange
from lazymem.wire.codec import encode
from lazymem.wire.frame import HEADER
from lazymem.wire.messages import (
    Hello,
    Welcome,
)
from tests.support.mounts import Server, wait_until
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.wireclient import ClosedByServerError, WireClient, connected, open_stream


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("crowds") / "web")


@pytest.mark.parametrize("descriptors", [24, 25])
def test_more_connections_than_descriptors(snapshot: BuiltSnapshot, descriptors: int) -> None:
    """The real server, with few descriptors, and 30 greeted connections, each of which costs it two: whoever does not
    fit waits or is dropped, the server says so in a line, and when they leave it serves the next."""
    server = Server(snapshot.folder, descriptors=descriptors)
    with contextlib.ExitStack() as crowd:
        crowd.callback(server.stop)
        connections = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(30)]
        for one in connections:
            crowd.callback(one.close)
            one.sendall(encode(Hello("web")))
        for one in connections[:3]:
            assert one.recv(HEADER.size)
        wait_until(lambda: open_descriptors(server.pid) >= descriptors - 1, "it has no descriptor left")
        for one in connections:
            one.close()
        trio.run(read_one_page, server.address, snapshot)
        assert server.is_running


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def read_one_page(address: str, snapshot: BuiltSnapshot) -> None:
    """Tries again as a mount does: the server may still be closing what the crowd left."""
    with trio.fail_after(60):
        while True:
            with contextlib.suppress(ClosedByServerError, trio.BrokenResourceError, OSError):
                async with await open_stream(address) as stream:
                    client = WireClient(stream)
                    if isinstance(await client.hello("web"), Welcome):
                        assert await client.read(PageRange(3, 1)) == snapshot.page(3)
                        return
            await trio.sleep(0.05)


async def test_a_crowd_that_is_refused_is_not_told_so_one_by_one(snapshot: BuiltSnapshot) -> None:
    """What a refused connection costs the server, a descriptor for a second, it costs for a few of them at a time."""
    limits = ServerLimits(max_clients_per_host=1, max_farewells=5, farewell_seconds=60)
    async with trio.open_nursery() as nursery:
        serving: Serving = await nursery.start(partial(serve, [snapshot.folder], ["127.0.0.1:0"], limits=limits))
        async with connected(serving.addresses[0]) as client, contextlib.AsyncExitStack() as crowd:
            streams = [await crowd.enter_async_context(await open_stream(serving.addresses[0])) for _ in range(12)]
            said = []
            with trio.fail_after(30):
                for stream in streams:
                    with contextlib.suppress(trio.BrokenResourceError):
                        said.append(bytes(await stream.receive_some(1 << 16)))
            assert sum(map(bool, said)) == 5
            assert await client.read(PageRange(3, 1)) == snapshot.page(3)
        nursery.cancel_scope.cancel()
