"""The fetch room's `Transport` over one end of a pair of trio's memory streams: no sockets, so the clock may jump."""

from __future__ import annotations

import trio
from trio.testing import MemoryReceiveStream, MemorySendStream

from lazymem.errors import ServerUnreachableError
from lazymem.fetch.transport import Reader

MemoryStream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]

RECEIVE_BYTES = 65536


class MemoryTransport:
    """Fits `lazymem.fetch.transport.Transport`. Never takes bytes at once, so that the writing task is exercised."""

    def __init__(self, stream: MemoryStream) -> None:
        self._stream = stream
        self._closed = False
        self._left = b""

    def send_nowait(self, data: bytes | memoryview) -> int:
        if self._closed:
            raise ServerUnreachableError("connection closed")
        return 0

    async def send_all(self, data: bytes | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ServerUnreachableError("connection lost") from error

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ServerUnreachableError("connection lost") from error

    async def receive_into(self, reader: Reader) -> bytes | int:
        data = self._left or await self.receive()
        room = reader.maybe_room()
        self._left = b""
        if room is None or not data:
            return data
        count = min(len(room), len(data))
        room[:count] = data[:count]
        self._left = data[count:]
        return count

    def receive_nowait(self) -> bytes | None:
        return None

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self._closed = True
        self._stream.send_stream.close()
        self._stream.receive_stream.close()
