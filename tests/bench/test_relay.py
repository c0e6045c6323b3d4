"""The relay as a process, over real sockets. Lower bounds only: a busy machine makes everything later."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bench.links import Link, through
from bench.relay import End, Relay, socket_buffer_bytes

SLOW = Link("slow", "20 ms, 10 MB/s", 0.020, 10e6)
BULK_BYTES = 3_000_000


class _Peer:
    """Accepts on a port of its own; echoes, or takes everything and counts."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []

    def answer(self, connections: int = 1) -> None:
        """Echo on so many connections, each to its end."""
        for _ in range(connections):
            thread = threading.Thread(target=self._echo)
            thread.start()
            self._threads.append(thread)

    def _echo(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    def close(self) -> None:
        self.listener.close()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def peer() -> Iterator[_Peer]:
    made = _Peer()
    yield made
    made.close()


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 65536))
        assert part, "the stream ended early"
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def test_a_round_trip_takes_at_least_the_links(peer: _Peer) -> None:
    peer.answer()
    with through(SLOW, peer.address) as seen:
        begun = time.monotonic()  # before the connection, whose own round trip counts from the relay's accept
        with _connect(seen.address) as connection:
            connection.sendall(b"a")
            assert connection.recv(1) == b"a"
            assert time.monotonic() - begun >= 2 * SLOW.round_trip_seconds  # and one for the connection
            for _ in range(5):
                started = time.monotonic()
                connection.sendall(b"b")
                assert connection.recv(1) == b"b"
                assert time.monotonic() - started >= SLOW.round_trip_seconds


@pytest.mark.parametrize("connections", [1, 3])
def test_all_connections_together_are_no_faster_than_the_link(peer: _Peer, connections: int) -> None:
    peer.answer(connections)
    each = BULK_BYTES // connections
    data = bytes(range(256)) * (each // 256)
    results: list[bytes] = []

    def carry(address: str) -> None:
        with _connect(address) as connection:
            sender = threading.Thread(target=connection.sendall, args=(data,))
            sender.start()
            results.append(_receive_exactly(connection, len(data)))
            sender.join()

    with through(SLOW, peer.address) as seen:
        started = time.monotonic()
        threads = [threading.Thread(target=carry, args=(seen.address,)) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - started
        carried = seen.maybe_carried()
    assert results == [data] * connections
    assert elapsed >= connections * len(data) / SLOW.rate_bytes + SLOW.round_trip_seconds
    assert carried is not None
    assert carried.forth_bytes == carried.back_bytes == connections * len(data)


def test_the_end_of_a_stream_passes_behind_its_bytes(peer: _Peer) -> None:
    peer.answer()
    with through(SLOW, peer.address) as seen, _connect(seen.address) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert _receive_exactly(connection, 10) == b"last words"
        assert connection.recv(1) == b""


def test_nobody_behind_the_relay_ends_the_connection(peer: _Peer) -> None:
    with socket.socket() as bound:  # and so nobody else's port either
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with through(SLOW, address) as seen, _connect(seen.address) as connection:
            assert connection.recv(1) == b""


def test_an_end_is_read_now_or_looked_at_again_in_time() -> None:
    """Whatever the moment: a relay that neither reads an end nor wakes up for it stands still for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay(listener, ("127.0.0.1", 1), SLOW.rate_bytes, SLOW.round_trip_seconds)
        one, other = socket.socketpair()
        with one, other:
            client, server = End(one, relay.forth, readable_from=5.0), End(other, relay.back)
            client.peer, server.peer = server, client
            relay.ends += [client, server]
            for now in (0.0, 4.999, 5.0, 6.0):
                assert relay.wants_read(client, now) or relay.wake_at(now) <= 5.0
            relay.forth.put(6.0, relay.forth.queue_bytes, (server, b""))
            for step in range(200):
                now = 6.0 + step * 0.001
                assert relay.wants_read(client, now) or relay.wake_at(now) < math.inf


def test_without_a_rate_there_is_no_relay(peer: _Peer) -> None:
    with through(Link("none", "none"), peer.address) as seen:
        assert seen.address == peer.address
        assert seen.maybe_carried() is None


@pytest.mark.parametrize(("megabits", "size"), [(1, 8192), (10, 8192), (50, 37_500), (100, 65536), (10_000, 65536)])
def test_the_relays_own_buffer_is_no_second_queue(megabits: float, size: int) -> None:
    assert socket_buffer_bytes(megabits * 1e6 / 8) == size
