"""A wire that flips bits: a relay in front of a server, which spoils what the server sends as a test wants it."""

from __future__ import annotations

import contextlib
import itertools
import random
import select
import socket
import threading

STEP_BYTES = 16 * 1024


class CorruptingWire:
    """Listens at `address` for `server` (HOST:PORT). While `spoiling`, one bit in each piece of 16 KiB is another; not
    on the first `spared` connections."""

    def __init__(self, server: str, seed: int) -> None:
        host, _, port = server.rpartition(":")
        self._to = (host, int(port))
        self._choose = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.spoiling = False
        self.spared = 0
        self.spoilt = 0
        self._begin(self._accept)

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _begin(self, work: object, *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count(1):
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
                self._ends += [client, server]
                self._begin(self._carry, client, server, 0)
                self._begin(self._carry, server, client, number)

    def _carry(self, source: socket.socket, target: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                select.select([source], [], [])
                data = source.recv(STEP_BYTES)
                if not data:
                    break
                target.sendall(self._spoilt(data) if self.spoiling and number > self.spared else data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _spoilt(self, data: bytes) -> bytes:
        spoilt = bytearray(data)
        spoilt[self._choose.randrange(len(spoilt))] ^= 1 << self._choose.randrange(8)
        self.spoilt += 1
        return bytes(spoilt)
