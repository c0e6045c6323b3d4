"""A plain client of the wire protocol for tests of the server: one connection, no retries, no cleverness."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.connection import CONNECTION_CLOSED, NEED_DATA, ClientConnection
from lazymem.wire.messages import (
    Cancelled,
    Digests,
    Error,
    Fetch,
    FetchFlag,
    FileData,
    FileStored,
    Hello,
    Message,
    Pages,
    PublishedFile,
    ReadFile,
    Welcome,
)
from lazymem.wire.pagedata import decode_pages


class ClosedByServerError(Exception):
    """The server ended the stream."""


class WireClient:
    """One connection that was greeted. `welcome` is what the server said."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.connection = ClientConnection()
        self.welcome: Welcome
        self._id = 0

    def next_id(self) -> int:
        self._id += 1
        return self._id

    async def send(self, message: Message) -> None:
        await self.stream.send_all(self.connection.send(message))

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ClosedByServerError: there is none.
        """
        while (event := self.connection.next_event()) is NEED_DATA:
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError as error:
                raise ClosedByServerError("reset") from error
            self.connection.receive_data(bytes(data))
        if event is CONNECTION_CLOSED:
            raise ClosedByServerError("end of stream")
        return event

    async def hello(self, name: str = "") -> Message:
        """Greet; the server's first message."""
        await self.send(Hello(name))
        answer = await self.receive()
        if isinstance(answer, Welcome):
            self.welcome = answer
        return answer

    async def answers(self, request_id: int) -> list[Message]:
        """All that comes up to the last word on `request_id`; it has to be the only open request."""
        found: list[Message] = []
        while True:
            message = await self.receive()
            found.append(message)
            if isinstance(message, Error | Cancelled | FileData | FileStored) and message.id == request_id:
                return found
            if isinstance(message, Pages | Digests) and message.final and message.id == request_id:
                return found

    async def fetch(self, *ranges: PageRange, flags: FetchFlag = FetchFlag.NONE) -> list[Message]:
        request = Fetch(self.next_id(), ranges, flags)
        await self.send(request)
        return await self.answers(request.id)

    async def read(self, *ranges: PageRange) -> bytes:
        """The bytes of `ranges`, one after the other."""
        return b"".join(page_bytes(answer) for answer in await self.fetch(*ranges))

    async def read_file(self, file: PublishedFile, offset: int, length: int) -> Message:
        request = ReadFile(self.next_id(), file, offset, length)
        await self.send(request)
        return (await self.answers(request.id))[-1]


def page_bytes(message: Message) -> bytes:
    """The decoded bytes of a PAGES message; anything else fails the test."""
    assert isinstance(message, Pages), message
    data = decode_pages(message)
    return bytes(message.pages.count * PAGE_SIZE) if data is None else bytes(data)


async def open_stream(address: str) -> trio.SocketStream:
    """Connect to an address as `Serving.addresses` has it."""
    if address.startswith("unix:"):
        return await trio.open_unix_socket(address[5:])
    host, _, port = address.rpartition(":")
    return await trio.open_tcp_stream(host.strip("[]"), int(port))


@asynccontextmanager
async def connected(address: str, name: str = "") -> AsyncIterator[WireClient]:
    """A client that was welcomed."""
    async with await open_stream(address) as stream:
        client = WireClient(stream)
        assert isinstance(await client.hello(name), Welcome)
        yield client


@asynccontextmanager
async def small_client(address: str) -> AsyncIterator[WireClient]:
    """A welcomed client over TCP whose socket holds next to nothing of what it does not read."""
    host, _, port = address.rpartition(":")
    inner = trio.socket.socket()
    inner.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await inner.connect((host, int(port)))
    async with trio.SocketStream(inner) as stream:
        client = WireClient(stream)
        assert isinstance(await client.hello(), Welcome)
        yield client
