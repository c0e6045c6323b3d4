"""Peers over memory streams, and what the fetch room's tests ask of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from lazymem.errors import ServerUnreachableError
from lazymem.fetch.client import Client, connect
from lazymem.fetch.scheduler import Scheduler
from lazymem.fetch.transport import Transport
from lazymem.pages import PageRun
from lazymem.settings import LinkSettings, ServerAddress, parse_server
from tests.support.memorysink import MemorySink
from tests.support.memorytransport import MemoryStream, MemoryTransport
from tests.support.peer import Peer, make_ram

ADDRESS = parse_server("ram.example:7411")


class Network:
    """Dials `peer` over memory streams; a test exchanges or removes it, and cuts connections."""

    def __init__(self, nursery: trio.Nursery, peer: Peer | None) -> None:
        self.peer = peer
        self.dials = 0
        self.lines: list[MemoryStream] = []
        self._nursery = nursery
        self._dialled = trio.Event()

    async def dialled(self, times: int) -> None:
        """Wait until so many connections were tried in all."""
        while self.dials < times:
            self._dialled = trio.Event()
            await self._dialled.wait()

    async def dial(self, address: ServerAddress, link: LinkSettings) -> Transport:
        await trio.lowlevel.checkpoint()
        self.dials += 1
        self._dialled.set()
        if self.peer is None:
            raise ServerUnreachableError("connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self.lines.append(theirs)
        self._nursery.start_soon(self.peer.serve, theirs)
        return MemoryTransport(ours)

    async def connect(self, link: LinkSettings | None = None) -> Client:
        return await connect(self._nursery, ADDRESS, link, dial_address=self.dial)

    async def cut(self) -> None:
        """End every connection, from the server's side."""
        lines, self.lines = self.lines, []
        for line in lines:
            await line.aclose()


@pytest.fixture
def peer() -> Peer:
    return Peer(make_ram())


@pytest.fixture
def network(nursery: trio.Nursery, peer: Peer) -> Network:
    return Network(nursery, peer)


def joined(runs: Sequence[PageRun]) -> bytes:
    """The bytes of runs, one after the other."""
    return b"".join(run.pages.length_bytes * b"\0" if run.data is None else bytes(run.data) for run in runs)


Joined = Callable[[Sequence[PageRun]], bytes]


@pytest.fixture(name="joined")
def joined_fixture() -> Joined:
    return joined


@pytest.fixture
def sink(peer: Peer) -> MemorySink:
    return MemorySink(peer.ram)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


def assert_empty(scheduler: Scheduler) -> None:
    """Nothing is left in any table."""
    statistics = scheduler.statistics()
    assert statistics.in_flight_pages == statistics.background_in_flight_pages == 0
    assert statistics.unkept_pages == statistics.queued_demands == 0
    assert not scheduler._flights
    assert not len(scheduler._table)
    assert scheduler._demands.flights == 0
    assert statistics.link is None or statistics.link.open_requests == 0
