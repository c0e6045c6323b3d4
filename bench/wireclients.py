"""Clients that speak the wire and look at nothing but the frames' heads, so that it is the server that is measured.

    python -m bench.wireclients HOST:PORT CLIENTS SECONDS     reads the image again and again, guessed pages
    python -m bench.wireclients HOST:PORT 0 SECONDS           demands one page after the other, at random

With CERT KEY CA NAME behind these: over TLS.

Prints one JSON object: pages of RAM that each client got and in how long; or the waiting times of the demands.
"""

from __future__ import annotations

import json
import random
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.settings import TlsSettings
from lazymem.tls.contexts import client_context
from lazymem.wire import frame
from lazymem.wire.codec import encode
from lazymem.wire.connection import NEED_DATA, ClientConnection
from lazymem.wire.frame import FrameType
from lazymem.wire.messages import Error, Fetch, FetchFlag, Hello, Welcome

REQUEST_PAGES = 256
OPEN_REQUESTS = 4
"""4 MiB asked for: more than any link's product, so that the server never waits for a client."""

DEMAND_PAUSE_SECONDS = 0.005
_RECEIVE_BYTES = 1 << 20
_HEAD = frame.HEADER_BYTES + frame.PAGES.size


def connect(address: str, maybe_tls: TlsSettings | None = None) -> tuple[socket.socket, ClientConnection, Welcome]:
    """A connection that has been welcomed."""
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if maybe_tls is not None:
        sock = client_context(maybe_tls).wrap_socket(sock, server_hostname=maybe_tls.name)
    connection = ClientConnection()
    sock.sendall(connection.send(Hello("")))
    while (event := connection.next_event()) is NEED_DATA:
        connection.receive_data(sock.recv(65536))
    if not isinstance(event, Welcome):
        raise RuntimeError(f"no welcome: {event}")
    return sock, connection, event


class FrameHeads:
    """Frames as far as they must be looked at: payloads are skipped, not kept. Pure."""

    def __init__(self) -> None:
        self._head = b""
        self._skip = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bool, int]]:
        """Of each frame whose head is complete now: type, whether it is the last of an answer, pages in it."""
        at, end = min(self._skip, len(data)), len(data)
        self._skip -= at
        while at < end:
            before = len(self._head)
            self._head += data[at : at + _HEAD - before]
            if len(self._head) < frame.HEADER_BYTES:
                return
            length, number, flags = frame.HEADER.unpack_from(self._head)[:3]
            wanted = min(_HEAD, frame.HEADER_BYTES + length)
            if len(self._head) < wanted:
                return
            at += wanted - before
            rest = frame.HEADER_BYTES + length - wanted
            self._skip = max(0, rest - (end - at))
            at = min(end, at + rest)
            pages = frame.PAGES.unpack_from(self._head, frame.HEADER_BYTES)[1] if number == FrameType.PAGES else 0
            self._head = b""
            yield number, bool(flags & frame.FINAL), pages


class Reader:
    """Reads the image from start to end, and from the start again."""

    def __init__(self, address: str, maybe_tls: TlsSettings | None = None) -> None:
        self.socket, _, welcome = connect(address, maybe_tls)
        self.socket.setblocking(False)
        self._total = welcome.ram_bytes // PAGE_SIZE
        self._next = self._ids = 0
        self._heads = FrameHeads()
        self.pages = 0
        for _ in range(OPEN_REQUESTS):
            self._ask()

    def _ask(self) -> None:
        self._ids += 1
        pages = PageRange(self._next, min(REQUEST_PAGES, self._total - self._next))
        self._next = pages.end % self._total
        flags = FetchFlag.BACKGROUND | FetchFlag.WANT_DIGESTS
        # Without the books that a connection keeps: those are a client's cost, not the server's.
        self.socket.sendall(encode(Fetch(self._ids, (pages,), flags)))

    def receive(self) -> None:
        """What the socket has; of what came through TLS, all that is decrypted."""
        while (data := self._maybe_data()) is not None:
            self._take(data)
            if not isinstance(self.socket, ssl.SSLSocket):
                return

    def _maybe_data(self) -> bytes | None:
        try:
            return self.socket.recv(_RECEIVE_BYTES)
        except ssl.SSLWantReadError:
            return None

    def _take(self, data: bytes) -> None:
        if not data:
            raise RuntimeError("the server closed the connection")
        for number, final, pages in self._heads.feed(data):
            if number == FrameType.ERROR:
                raise RuntimeError("the server sent an error")
            self.pages += pages
            if number == FrameType.PAGES and final:
                self._ask()


def read(address: str, clients: int, seconds: float, maybe_tls: TlsSettings | None = None) -> dict[str, list[float]]:
    """Pages that each client got."""
    readers = [Reader(address, maybe_tls) for _ in range(clients)]
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader.socket, selectors.EVENT_READ, reader)
        started = time.perf_counter()
        while (now := time.perf_counter()) < started + seconds:
            for key, _ in selector.select(1.0):
                key.data.receive()
    for reader in readers:
        reader.socket.close()
    return {"pages": [reader.pages for reader in readers], "seconds": [now - started]}


def demand(address: str, seconds: float, maybe_tls: TlsSettings | None = None) -> dict[str, list[float]]:
    """How long each of many single pages took, with a pause between them."""
    sock, connection, welcome = connect(address, maybe_tls)
    choose = random.Random(9)
    waits: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        page = choose.randrange(welcome.ram_bytes // PAGE_SIZE)
        sock.sendall(connection.send(Fetch(len(waits) + 1, (PageRange(page, 1),), FetchFlag.WANT_DIGESTS)))
        while not getattr(event := connection.next_event(), "final", False):
            if isinstance(event, Error):
                raise RuntimeError(event.text)
            if event is NEED_DATA:
                connection.receive_data(sock.recv(65536))
        waits.append(time.perf_counter() - started)
        time.sleep(DEMAND_PAUSE_SECONDS)
    sock.close()
    return {"waits": waits}


def main() -> int:
    """Runs the clients; returns the exit code."""
    address, clients, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    maybe_tls = None
    if len(sys.argv) > 4:
        cert, key, ca, name = sys.argv[4:]
        maybe_tls = TlsSettings(Path(cert), Path(key), Path(ca), name)
    found = read(address, clients, seconds, maybe_tls) if clients else demand(address, seconds, maybe_tls)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
