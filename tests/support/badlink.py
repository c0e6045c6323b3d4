"""A link that fails as told: a TCP relay that cuts, resets, goes silent, forgets, trickles, delays, and flips bits.

Threads in the process that uses it: one accepts, two carry each connection. What `mode` says holds for all of them at
once; a test changes it while bytes are on their way.
"""

from __future__ import annotations

import contextlib
import enum
import random
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

PIECE_BYTES = 65536
LOOK_SECONDS = 0.01
TRICKLE_SECONDS = 0.05
"""Between two bytes of a trickle."""


class Mode(enum.Enum):
    """What happens to bytes."""

    GOOD = "good"
    SILENT = "silent"
    """Held, as by a process that stands; what was held arrives later."""
    TRICKLE = "trickle"
    """A byte now and then."""
    REFUSED = "refused"
    """New connections are reset at once; what is there goes on."""


class _Connection:
    """Both sides of one. `lost`: nothing is carried any more, and nobody is told."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.lost = False

    def reset(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the threads
            end.close()


class BadLink:
    """Listens on 127.0.0.1 and carries to `target` (HOST:PORT); `retarget` says where later connections go."""

    def __init__(self, target: str, seed: int = 0) -> None:
        self.mode = Mode.GOOD
        self.delay_seconds = 0.0
        self.piece_bytes = PIECE_BYTES
        """What is carried, and delayed, at a time."""
        self.flip_share = 0.0
        """How many of the pieces have a flipped bit, in either direction."""
        self.flips = self.accepted = 0
        self._rng = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._closing = False
        self.retarget(target)
        self._start(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def retarget(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))

    def cut(self) -> None:
        """End every connection in order, as a server does that goes away."""
        for connection in self._taken():
            connection.close()

    def reset(self) -> None:
        """End every connection with a RST."""
        for connection in self._taken():
            connection.reset()

    def forget(self) -> None:
        """Every connection is half-open from now on: its server has lost it, its client hears nothing, ever."""
        for connection in list(self._connections):
            connection.lost = True
            with contextlib.suppress(OSError):
                connection.server.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            alive[0].join()  # the one that accepts may start two more

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _taken(self) -> list[_Connection]:
        connections, self._connections = self._connections, []
        return connections

    def _start(self, target: object, *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            connection = _Connection(client, socket.socket())
            try:
                if self.mode is Mode.REFUSED:
                    raise ConnectionRefusedError
                connection.server.connect(self._target)
            except OSError:
                connection.reset()
                continue
            for end in (connection.client, connection.server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
            if self._closing:  # which may not have seen this one
                connection.close()
            self._start(self._carry, connection, connection.client, connection.server)
            self._start(self._carry, connection, connection.server, connection.client)

    def _carry(self, connection: _Connection, source: socket.socket, to: socket.socket) -> None:
        try:
            while data := source.recv(self.piece_bytes):
                if self._rng.random() < self.flip_share:
                    data = self._flipped(data)
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                self._pass_on(connection, data, to)
        except OSError:
            pass
        if not connection.lost:
            with contextlib.suppress(OSError):
                to.shutdown(socket.SHUT_WR)

    def _pass_on(self, connection: _Connection, data: bytes, to: socket.socket) -> None:
        while data and not self._closing and to.fileno() >= 0:
            if connection.lost:
                return
            if self.mode is Mode.SILENT:
                time.sleep(LOOK_SECONDS)
            elif self.mode is Mode.TRICKLE:
                time.sleep(TRICKLE_SECONDS)
                to.sendall(data[:1])
                data = data[1:]
            else:
                to.sendall(data)
                return

    def _flipped(self, data: bytes) -> bytes:
        at = self._rng.randrange(len(data))
        self.flips += 1
        return data[:at] + bytes([data[at] ^ (1 << self._rng.randrange(8))]) + data[at + 1 :]
