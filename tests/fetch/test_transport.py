"""Real sockets: dialling, sending at once, what a full or broken socket does; and a whole client over both kinds."""

from __future__ import annotations

import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lazymem.errors import ServerUnreachableError
from lazymem.fetch.client import connect
from lazymem.fetch.transport import MOST_IN_A_ROW, SocketTransport, dial
from lazymem.pages import PageRange
from lazymem.settings import LinkSettings, ServerAddress, TcpEndpoint, UnixEndpoint
from tests.fetch.conftest import Joined
from tests.support.peer import Peer

LINK = LinkSettings()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[SocketTransport, socket.socket]]:
    ours, theirs = socket.socketpair()
    transport = SocketTransport(ours)
    with theirs:
        yield transport, theirs
        transport.close()


async def test_bytes_go_out_at_once_until_the_kernel_is_full(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, theirs = pair
    assert transport.send_nowait(b"hello") == 5
    assert theirs.recv(100) == b"hello"
    block = bytes(1 << 20)
    while transport.send_nowait(block):
        pass
    assert transport.send_nowait(block) == 0


async def test_send_all_waits_for_room(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, theirs = pair
    block = bytes(range(256)) * 8192
    received = bytearray()
    theirs.setblocking(False)

    async def drain() -> None:
        while len(received) < len(block):
            await trio.lowlevel.wait_readable(theirs)
            received.extend(theirs.recv(1 << 20))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await transport.send_all(block)
    assert received == block


async def test_end_of_stream_is_empty_bytes_and_then_broken(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, theirs = pair
    theirs.sendall(b"last words")
    theirs.close()
    assert await transport.receive() == b"last words"
    assert await transport.receive() == b""
    with pytest.raises(ServerUnreachableError, match="connection lost"):
        transport.send_nowait(b"x")


async def test_close_ends_every_wait(pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, _ = pair
    ended: list[str] = []

    async def wait(what: str) -> None:
        with pytest.raises(ServerUnreachableError):
            await (transport.receive() if what == "receive" else transport.send_all(bytes(1 << 24)))
        ended.append(what)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "receive")
        nursery.start_soon(wait, "send")
        await trio.testing.wait_all_tasks_blocked()
        transport.close()
        transport.close()
    assert sorted(ended) == ["receive", "send"]
    with pytest.raises(ServerUnreachableError):
        await transport.receive()
    with pytest.raises(ServerUnreachableError):
        transport.send_nowait(b"x")


async def test_dialled_tcp_socket_is_tuned() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport = await dial(TcpEndpoint("127.0.0.1", listener.getsockname()[1]), LINK)
        assert isinstance(transport, SocketTransport)
        connected = transport._socket
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert 1000 <= connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 10_000
        transport.close()


async def test_nobody_there_is_said_in_words(tmp_path: Path) -> None:
    with socket.socket() as bound:  # and so nobody else's port either
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(ServerUnreachableError, match=f"127.0.0.1:{port}: Connection refused"):
            await dial(TcpEndpoint("127.0.0.1", port), LINK)
    with pytest.raises(ServerUnreachableError, match="No such file"):
        await dial(UnixEndpoint(str(tmp_path / "none")), LINK)
    (tmp_path / "file").touch(stat.S_IRUSR | stat.S_IWUSR)
    with pytest.raises(ServerUnreachableError, match="refused"):
        await dial(UnixEndpoint(str(tmp_path / "file")), LINK)
    with pytest.raises(ServerUnreachableError, match=r"no\.such\.host\.invalid:1"):
        await dial(TcpEndpoint("no.such.host.invalid", 1), LINK)


async def serve_tcp(peer: Peer, nursery: trio.Nursery) -> ServerAddress:
    listeners = await nursery.start(trio.serve_tcp, peer.serve, 0)
    return ServerAddress(TcpEndpoint("127.0.0.1", listeners[0].socket.getsockname()[1]))


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_client_over_real_sockets(
    kind: str, peer: Peer, nursery: trio.Nursery, joined: Joined, tmp_path: Path
) -> None:
    if kind == "tcp":
        address = await serve_tcp(peer, nursery)
    else:
        unix = trio.socket.socket(socket.AF_UNIX)
        await unix.bind(str(tmp_path / "s"))
        unix.listen()
        nursery.start_soon(trio.serve_listeners, peer.serve, [trio.SocketListener(unix)])
        address = ServerAddress(UnixEndpoint(str(tmp_path / "s")))
    client = await connect(nursery, address)
    everything = PageRange(0, len(peer.ram) >> 12)
    assert joined((await client.fetch([everything])).runs) == peer.ram
    assert joined((await client.fetch([everything], background=True)).runs) == peer.ram
    statistics = client.statistics()
    assert statistics.wire_received_bytes > len(peer.ram) // 2
    assert statistics.connection == f"{address}: connected"
    nursery.cancel_scope.cancel()


async def test_reconnect_over_tcp(peer: Peer, nursery: trio.Nursery, joined: Joined) -> None:
    client = await connect(nursery, await serve_tcp(peer, nursery))
    for page in range(5):
        fetched = await client.fetch([PageRange(page, 1)])
        assert joined(fetched.runs) == peer.bytes_of(PageRange(page, 1))
        await peer.streams[-1].aclose()
    await client.fetch([PageRange(9, 1)])
    assert client.statistics().reconnects == 5
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
async def test_a_name_that_no_host_can_have(host: str) -> None:
    """The resolver says so with an error of its own kind."""
    with pytest.raises(ServerUnreachableError, match="no host"):
        await dial(TcpEndpoint(host, 7411), LinkSettings())


class Expecting:
    """A `transport.Reader` that waits for so many bytes, and has room for them or not."""

    def __init__(self, count: int, *, room: bool) -> None:
        self._buffer = memoryview(bytearray(count))
        self._room = room

    @property
    def missing(self) -> int:
        return len(self._buffer)

    def maybe_room(self) -> memoryview | None:
        return self._buffer if self._room else None


@pytest.fixture
async def tcp_pair() -> AsyncIterator[tuple[SocketTransport, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    transport = SocketTransport(ours)
    with theirs:
        yield transport, theirs
        transport.close()


async def test_bytes_come_to_where_they_belong(tcp_pair: tuple[SocketTransport, socket.socket]) -> None:
    transport, theirs = tcp_pair
    reader = Expecting(5, room=True)
    theirs.sendall(b"hello, you")
    assert await transport.receive_into(reader) == 5
    assert bytes(reader.maybe_room() or b"") == b"hello"
    assert await transport.receive_into(Expecting(1, room=False)) == b", you"
    theirs.close()
    assert await transport.receive_into(reader) == 0
    assert await transport.receive_into(Expecting(1, room=False)) == b""


async def test_who_waits_for_much_is_not_woken_for_little_but_for_the_end(
    tcp_pair: tuple[SocketTransport, socket.socket],
) -> None:
    transport, theirs = tcp_pair
    came: list[bytes | int] = []

    async def receive() -> None:
        came.append(await transport.receive_into(Expecting(10_000, room=True)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        theirs.sendall(bytes(100))
        await wait_all_tasks_blocked(0.01)
        assert not came
        theirs.close()
    assert came == [100]


async def test_what_another_task_took_is_not_waited_for(tcp_pair: tuple[SocketTransport, socket.socket]) -> None:
    """It may have been the end of what much was missing of: whatever comes then has to be noticed."""
    transport, theirs = tcp_pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.receive_into, Expecting(10_000, room=False))
        await wait_all_tasks_blocked()
        theirs.sendall(bytes(100))
        await wait_all_tasks_blocked(0.01)
        assert transport.receive_nowait() == bytes(100)
        theirs.sendall(b"x")  # ends `receive_into`, and with it the test


async def test_others_have_their_turn_while_a_stream_never_runs_dry(
    pair: tuple[SocketTransport, socket.socket],
) -> None:
    transport, theirs = pair
    theirs.sendall(bytes(1000))
    turns: list[int] = []

    async def other() -> None:
        turns.append(0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(2 * MOST_IN_A_ROW + 1):  # the first turn may be another's first or ours
            assert await transport.receive_into(Expecting(1, room=True)) == 1
        assert turns


async def test_little_is_noticed_after_many_reads_in_a_row(tcp_pair: tuple[SocketTransport, socket.socket]) -> None:
    """How much was missing when the stream ran dry before is not how much is missing now."""
    transport, theirs = tcp_pair
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.receive_into, Expecting(10_000, room=False))
            await wait_all_tasks_blocked()
            theirs.sendall(bytes(10_000))
        theirs.sendall(bytes(2 * MOST_IN_A_ROW))
        for _ in range(2 * MOST_IN_A_ROW):
            assert await transport.receive_into(Expecting(1, room=True)) == 1
