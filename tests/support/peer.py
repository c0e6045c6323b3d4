"""A small honest server for the fetch room's tests: RAM in memory, every answer open to a test's interference.

It speaks through the wire's own `ServerConnection`, so that what a test scripts is legal unless it means not to be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from lazymem.digests import DIGEST_BYTES, page_digest
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange
from lazymem.wire.connection import CONNECTION_CLOSED, NEED_DATA, ServerConnection
from lazymem.wire.messages import (
    Cancel,
    Cancelled,
    Capability,
    Encoding,
    Fetch,
    FetchFlag,
    FileData,
    Goodbye,
    Hello,
    Limits,
    Message,
    Pages,
    Ping,
    Pong,
    ReadFile,
    Welcome,
)
from lazymem.wire.pagedata import encode_pages

RAM_PAGES = 512


def make_ram(pages: int = RAM_PAGES) -> bytes:
    """Every third page zero, every third compressible, every third random, each with its number in front."""
    kinds: list[Callable[[int], bytes]] = [
        lambda page: bytes(PAGE_SIZE),
        lambda page: page.to_bytes(8, "little") * (PAGE_SIZE // 8),
        lambda page: page.to_bytes(8, "little") + os.urandom(PAGE_SIZE - 8),
    ]
    return b"".join(kinds[page % 3](page) for page in range(pages))


@dataclass
class Peer:
    """`answers(peer, request)` gives the messages for a request; None leaves it open (a test answers by `say`)."""

    ram: bytes
    identity: bytes = bytes(32)
    limits: Limits = field(default_factory=lambda: Limits(256, 64, 64))
    capabilities: Capability = Capability.ZSTD
    vmstate: bytes = b"device state"
    answers: Callable[[Peer, Message], Sequence[Message] | None] | None = None
    pong: bool = True
    requests: list[Message] = field(default_factory=list)
    hellos: list[Hello] = field(default_factory=list)
    connections: list[ServerConnection] = field(default_factory=list)
    streams: list[trio.abc.Stream] = field(default_factory=list)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection, to its end, whichever side ends it."""
        connection = self.new_connection()
        self.connections.append(connection)
        self.streams.append(stream)
        try:
            async with stream:
                while True:
                    event = connection.next_event()
                    if event is CONNECTION_CLOSED:
                        return
                    if event is NEED_DATA:
                        connection.receive_data(bytes(await stream.receive_some(65536)))
                        continue
                    assert not isinstance(event, type(NEED_DATA))
                    for answer in self._answer(connection, event):
                        await stream.send_all(connection.send(answer))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    def new_connection(self) -> ServerConnection:
        return ServerConnection()

    async def say(self, message: Message, connection: int = -1) -> None:
        """Send something of a test's own on one of the connections."""
        await self.streams[connection].send_all(self.connections[connection].send(message))

    @property
    def fetches(self) -> list[Fetch]:
        return [request for request in self.requests if isinstance(request, Fetch)]

    def welcome(self, hello: Hello) -> Welcome:
        return Welcome(
            version=1,
            capabilities=hello.capabilities & self.capabilities,
            limits=self.limits,
            name=hello.name or "only",
            identity=self.identity,
            ram_bytes=len(self.ram),
            hashed=False,
            manifest=b"",
            vmstate_bytes=len(self.vmstate),
        )

    def _answer(self, connection: ServerConnection, event: Message) -> Sequence[Message]:
        if isinstance(event, Hello):
            self.hellos.append(event)
            return [self.welcome(event)]
        if isinstance(event, Ping):
            return [Pong(event.id)] if self.pong else []
        if isinstance(event, Pong | Goodbye):
            return []
        if isinstance(event, Cancel):
            self.requests.append(event)
            return [Cancelled(event.id)] if connection.is_open(event.id) else []
        self.requests.append(event)
        answers = self.answers(self, event) if self.answers is not None else self.honest(event)
        return answers if answers is not None else []

    def honest(self, request: Message) -> list[Message]:
        """The right answer."""
        if isinstance(request, ReadFile):
            return [FileData(request.id, self.vmstate[request.offset : request.offset + request.length])]
        assert isinstance(request, Fetch)
        return self.pages(request.id, request.ranges)

    def pages(self, request_id: int, ranges: Sequence[PageRange], frame_pages: int = 64) -> list[Message]:
        """PAGES frames for `ranges`, at most so many pages each, the last one final."""
        pieces = [piece for pages in ranges for piece in pages.pieces(frame_pages)]
        return [self.frame(request_id, piece, final=index == len(pieces) - 1) for index, piece in enumerate(pieces)]

    def frame(self, request_id: int, pages: PageRange, final: bool = True) -> Pages:
        data = self.ram[pages.offset_bytes : pages.offset_bytes + pages.length_bytes]
        encoding, encoded = encode_pages(data, self.capabilities)
        digests = b"" if encoding == Encoding.ZERO else digests_of(data)
        return Pages(request_id, pages, encoding, encoded, digests, final)

    def bytes_of(self, pages: PageRange) -> bytes:
        return self.ram[pages.offset_bytes : pages.offset_bytes + pages.length_bytes]


def digests_of(data: bytes) -> bytes:
    digests = b"".join(page_digest(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE))
    assert len(digests) == (len(data) >> PAGE_SHIFT) * DIGEST_BYTES
    return digests


def is_background(fetch: Fetch) -> bool:
    return bool(fetch.flags & FetchFlag.BACKGROUND)
