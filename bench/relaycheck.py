"""What the relay itself does to bytes: round trip, rate with one and with four connections, processor time."""

from __future__ import annotations

import socket
import statistics
import threading
import time

from bench.links import Link, through

PINGS = 300
BULK_SECONDS = 2.0
_PIECE = bytes(256 * 1024)


def check(link: Link) -> dict[str, float]:
    """Round trip (median, p99; seconds), and bytes a second towards the client over one and over four connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener,), daemon=True)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with through(link, address) as seen:
            trips = _ping(seen.host, seen.port)
            before = seen.maybe_carried()
            one = _bulk(seen.host, seen.port, 1)
            after = seen.maybe_carried()
            four = _bulk(seen.host, seen.port, 4)
    found = {
        "round_trip_p50_seconds": statistics.median(trips),
        "round_trip_p99_seconds": sorted(trips)[int(len(trips) * 0.99)],
        "one_connection_bytes_per_second": one,
        "four_connections_bytes_per_second": four,
    }
    if before and after:
        spent = after.cpu_seconds - before.cpu_seconds
        found["cpu_seconds_per_gigabyte"] = spent / (after.back_bytes - before.back_bytes) * 1e9
    return found


def _serve(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    """A byte `p` is given back; `b` starts bytes without end."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        try:
            while (asked := connection.recv(1)) == b"p":
                connection.sendall(asked)
            while asked == b"b":
                connection.sendall(_PIECE)
        except OSError:
            return


def _ping(host: str, port: int) -> list[float]:
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for number in range(PINGS + 1):
            started = time.perf_counter()
            connection.sendall(b"p")
            connection.recv(1)
            if number:  # the first one waits for the connection as well
                trips.append(time.perf_counter() - started)
        return trips


def _bulk(host: str, port: int, connections: int) -> float:
    counts = [0] * connections
    first = threading.Barrier(connections + 1)

    def receive(index: int) -> None:
        with socket.create_connection((host, port)) as connection:
            connection.sendall(b"b")
            buffer = bytearray(256 * 1024)
            connection.recv_into(buffer)
            first.wait()
            end = time.perf_counter() + BULK_SECONDS
            while time.perf_counter() < end:
                counts[index] += connection.recv_into(buffer)

    threads = [threading.Thread(target=receive, args=(index,)) for index in range(connections)]
    for thread in threads:
        thread.start()
    first.wait()
    for thread in threads:
        thread.join()
    return sum(counts) / BULK_SECONDS
