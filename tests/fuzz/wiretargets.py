"""Fuzz targets of the wire, in both directions: see `targets`."""

from __future__ import annotations

import contextlib

from lazymem.errors import LocalProtocolError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire.codec import decode, encode
from lazymem.wire.connection import (
    CONNECTION_CLOSED,
    NEED_DATA,
    ClientConnection,
    Connection,
    Event,
    ServerConnection,
)
from lazymem.wire.frame import HEADER, RULES, FrameType, header_problem
from lazymem.wire.limits import MAX_FRAME_PAGES
from lazymem.wire.messages import (
    Capability,
    Encoding,
    Error,
    Fetch,
    FetchDigests,
    FetchFlag,
    Goodbye,
    Hello,
    Level,
    Limits,
    Message,
    Packed,
    Pages,
    Ping,
    Pong,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)
from lazymem.wire.pagedata import decode_data, decode_pages
from tests.fuzz.registry import IDENTITY, TOTAL_PAGES, target

# ---- the wire


_ALL = Capability.ZSTD | Capability.LEARN | Capability.PACKED


def _welcome(hashed: bool) -> Welcome:
    return Welcome(
        version=1,
        capabilities=_ALL,
        limits=Limits(512, 8, 4),
        name="web",
        identity=IDENTITY,
        ram_bytes=TOTAL_PAGES * PAGE_SIZE,
        hashed=hashed,
        manifest=b"{}",
        vmstate_bytes=5000,
    )


REQUESTS: tuple[Message, ...] = (
    Fetch(1, (PageRange(5, 2),), FetchFlag.WANT_DIGESTS),
    Fetch(2, (PageRange(256, 3), PageRange(300, 256)), FetchFlag.BACKGROUND | FetchFlag.PACKED),
    FetchDigests(3, Level.UPPER, 0, 4),
    ReadFile(4, PublishedFile.VMSTATE, 0, 200),
)
"""What a client has asked for when the fuzzed bytes come."""

UNHASHED_REQUESTS: tuple[Message, ...] = (
    Fetch(1, (PageRange(5, 2),)),
    Fetch(2, (PageRange(256, 3), PageRange(300, 256)), FetchFlag.BACKGROUND),
    StoreFile(3, PublishedFile.WORKING_SET, 0, 5, b"first"),
    ReadFile(4, PublishedFile.VMSTATE, 0, 200),
)


def _greeted(hashed: bool) -> tuple[ClientConnection, ServerConnection]:
    """Both ends of a connection that is open."""
    client, server = ClientConnection(), ServerConnection()
    server.receive_data(client.send(Hello("web", capabilities=_ALL)))
    assert isinstance(server.next_event(), Hello)
    client.receive_data(server.send(_welcome(hashed)))
    assert isinstance(client.next_event(), Welcome)
    return client, server


def _talk(ours: Connection, data: bytes, piece_bytes: int) -> None:
    """Take `data` in pieces; each message that it makes must be one that could have been sent."""
    for at in range(0, len(data), piece_bytes):
        ours.receive_data(data[at : at + piece_bytes])
        while (event := ours.next_event()) is not NEED_DATA:
            _look_at(ours, event)
    ours.receive_data(b"")
    while (event := ours.next_event()) is not CONNECTION_CLOSED:
        _look_at(ours, event)


def _look_at(ours: Connection, event: Event) -> None:
    assert event is not NEED_DATA
    assert event is not CONNECTION_CLOSED
    _comes_back(event)
    if isinstance(event, Pages):
        decoded = decode_pages(event)
        assert decoded is None or len(decoded) == event.pages.length_bytes
    elif isinstance(event, Packed):
        assert len(decode_data(event.encoding, event.data, event.count)) == event.count * PAGE_SIZE
    elif isinstance(event, Ping):
        ours.send(Pong(event.id))
    elif isinstance(event, Hello):
        # A server whose client asks for another snapshot answers with an error; this one is the only.
        with contextlib.suppress(LocalProtocolError):
            ours.send(_welcome(hashed=True))


def _comes_back(message: Message) -> None:
    frame = encode(message)
    header = HEADER.unpack_from(frame)
    again = decode(header[1], header[2], header[4], frame, HEADER.size, len(frame))
    if isinstance(message, Error):  # what is no UTF-8 becomes longer as a text, and is cut when it is sent
        assert isinstance(again, Error)
        assert message.text.startswith(again.text)
    elif isinstance(message, Goodbye):
        assert isinstance(again, Goodbye)
        assert message.reason.startswith(again.reason)
    else:
        assert again == message, (again, message)


@target
def wire_from_client(data: bytes) -> None:
    """First byte: bit 0 greeted, bit 1 hashed, the rest how long the pieces are."""
    if not data:
        return
    choice, data = data[0], data[1:]
    server = _greeted(hashed=bool(choice & 2))[1] if choice & 1 else ServerConnection()
    lone = server.lone_fetch(data)
    if lone is not None:
        request_id, flags, start, count = lone
        server.receive_data(data)
        assert server.next_event() == Fetch(request_id, (PageRange(start, count),), FetchFlag(flags))
        return
    _talk(server, data, (choice >> 2) + 1 if choice & 0x80 else len(data) or 1)


@target
def wire_from_server(data: bytes) -> None:
    """As `wire_from_client`; with `REQUESTS` open where it is greeted."""
    if not data:
        return
    choice, data = data[0], data[1:]
    hashed = bool(choice & 2)
    if choice & 1:
        client, twin = _greeted(hashed)[0], _greeted(hashed)[0]
        for request in REQUESTS if hashed else UNHASHED_REQUESTS:
            client.send(request)
            twin.send(request)
        lone = twin.lone_answer(data)
        if lone is not None:
            client.receive_data(data)
            message = client.next_event()
            assert isinstance(message, Pages)
            assert (message.id, message.pages.start, message.pages.count, decode_pages(message)) == lone
            return
    else:
        client = ClientConnection()
        client.send(Hello("", capabilities=_ALL))
    _talk(client, data, (choice >> 2) + 1 if choice & 0x80 else len(data) or 1)


@target
def frame(data: bytes) -> None:
    """One frame of a type that the first byte chooses, flags the second; its length is right, whatever follows."""
    if len(data) < 2:
        return
    kinds = list(FrameType)
    kind = kinds[data[0] % len(kinds)]
    request_id = 0 if RULES[kind].has_id is False else 1
    sender = next(iter(RULES[kind].senders))
    if header_problem(sender, len(data) - 2, kind, data[1], 0, request_id) is not None:
        return
    _comes_back(decode(kind, data[1], request_id, data, 2, len(data)))


@target
def page_data(data: bytes) -> None:
    """Compressed pages, of a number that the first byte says."""
    if data:
        count = data[0] % MAX_FRAME_PAGES + 1
        assert len(decode_data(Encoding.ZSTD, data[1:], count)) == count * PAGE_SIZE
