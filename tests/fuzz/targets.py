"""What is fuzzed: for each reader of bytes from outside a function that feeds it and checks what must always hold.

Each gets any bytes. It may refuse them with a `LazymemError`, which is swallowed here; anything else that comes out of
a target is a bug: another exception, an assertion about what was accepted (most often that it comes back the same when
it is encoded again), memory or time without bound (the drivers watch those two).

Many formats end in a checksum, which no mutation gets right. Their targets look at the first byte: when it is odd, the
rest is sealed here, so that the reader behind the checksum is reached.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from lazymem.demo import streamscan
from lazymem.digests import DIGEST_BYTES, TreeShape, leaf_matches, root_digest
from lazymem.errors import LazymemError, LocalProtocolError
from lazymem.handover import journal, messages
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.settings import parse_server
from lazymem.snapshot import deltaindex, manifest, workingset
from lazymem.snapshot.layers import WholeDigests
from lazymem.snapshot.publishedfile import PublishedFile as FileOnDisk
from lazymem.snapshot.vouching import TreeVouching
from lazymem.store.digestfile import DigestFile
from lazymem.store.folders import maybe_record
from lazymem.store.pagemap import UNSET, PageMap
from lazymem.vm.devicestate import Field, Layout
from lazymem.vm.savestream.format import BlockShape, StreamShape
from lazymem.vm.savestream.loader import load
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

Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {}

IDENTITY = bytes(range(32))
TOTAL_PAGES = 1000

T = TypeVar("T")


def target(function: Target) -> Target:
    """Registers it under its name, and takes every `LazymemError` for a refusal."""

    def guarded(data: bytes) -> None:
        with contextlib.suppress(LazymemError):
            function(data)

    TARGETS[function.__name__] = guarded
    return guarded


def maybe(read: Callable[[], T]) -> T | None:
    """None where it is refused."""
    try:
        return read()
    except LazymemError:
        return None


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


# ---- a snapshot's files


@target
def manifest_json(data: bytes) -> None:
    maybe(lambda: manifest.parse_made_by(data))
    found = manifest.parse(data)
    assert manifest.parse(found.to_json()) == found
    assert len(found.identity) == 32
    _ = found.ram, found.resume_notices


def _sealed(data: bytes) -> bytes:
    """Without its first byte; where that is odd, with a checksum as working set and delta index have it."""
    body = data[1:]
    return body + blake3(body).digest(32) if data[:1] and data[0] & 1 else body


@target
def working_set(data: bytes) -> None:
    data = _sealed(data)
    found = workingset.decode(data, IDENTITY, TOTAL_PAGES)
    assert workingset.encode(found) == data
    assert found.pages <= TOTAL_PAGES


@target
def delta_index(data: bytes) -> None:
    data = _sealed(data)
    found = deltaindex.decode(data, IDENTITY, TOTAL_PAGES)
    again = deltaindex.encode(found, IDENTITY)
    assert again[:10] == data[:10]
    assert again[16:-32] == data[16:-32]  # what is reserved may be anything
    pages = [page for run in found.runs for page in range(run.start, run.end)]
    assert len(pages) == found.pages
    assert [found.position(page) for page in pages] == list(range(len(pages)))
    assert [run.count for run, _ in found.segments(PageRange(0, TOTAL_PAGES))]


def _memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("lazymem-fuzz", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@target
def page_map(data: bytes) -> None:
    """The map file of a cache or state folder: any byte may stand for any page."""
    if not data:
        return
    found = PageMap(_memory_file(data), len(data))
    try:
        everything = PageRange(0, len(data))
        unset = {page for page, state in enumerate(data) if state == UNSET}
        assert found.states(everything) == data
        assert found.count == len(data) - len(unset)
        assert {page for run in found.unset_runs(everything) for page in range(run.start, run.end)} == unset
        assert found.all_unset(everything) == (not found.count)
        found.set(PageRange(0, 1), 1)
        assert found.count == found.recount() == len(data) - len(unset - {0})
    finally:
        found.close()


def _shape(data: bytes) -> TreeShape | None:
    """The shape of the tree whose digests file has as many bytes, if there is such a one."""
    for pages in range(max(1, len(data) // DIGEST_BYTES - 1 - len(data) // 4096), len(data) // DIGEST_BYTES):
        shape = TreeShape(pages * PAGE_SIZE)
        if shape.file_bytes == len(data):
            return shape
    return None


@target
def digests_file(data: bytes) -> None:
    """A cache's and a snapshot's: with the root that its upper level has, every leaf is right or refused."""
    shape = _shape(data)
    if shape is None:
        return
    upper = data[shape.upper_offset :]
    root = root_digest(shape.size_bytes, upper)
    cached = DigestFile(_memory_file(data), shape)
    try:
        assert cached.maybe_upper(root) == upper
        assert cached.maybe_upper(bytes(32)) is None
        assert cached.page_digests(PageRange(0, shape.pages)) == data[: shape.upper_offset]
    finally:
        cached.close()
    vouching = TreeVouching(WholeDigests(FileOnDisk(_memory_file(data)), shape), Path("digests"), shape, root)
    try:
        for leaf in range(shape.leaves):
            found = maybe(lambda leaf=leaf: vouching.leaf(leaf))  # type: ignore[misc]
            assert found is None or leaf_matches(upper, leaf, found)
            first = leaf * 256 * DIGEST_BYTES
            assert (found is None) != leaf_matches(upper, leaf, data[first : first + shape.leaf_pages(leaf) * 16])
    finally:
        vouching.close()


# ---- save streams

RAM = BlockShape("pc.ram", 4 * PAGE_SIZE, backed=True, do_not_save=True)
BIOS = BlockShape("pc.bios", PAGE_SIZE)
CPU = Layout("cpu", 2, (Field("rip", 8), Field("halted", 1), Field("fpu", 16, buffer=True)))
UART = Layout("serial", 3, (Field("lcr", 1), Field("divider", 2)))
SHAPE = StreamShape("lazymem-test-1", (RAM, BIOS), (CPU, UART))


@target
def save_stream(data: bytes) -> None:
    """lazymem-vm's loader: what it lets through is whole."""
    saved = load(data, SHAPE)
    assert set(saved.devices) == {(layout.name, layout.instance) for layout in SHAPE.layouts}
    assert len(saved.pages[BIOS.name]) == 1
    assert not saved.pages[RAM.name]


@target
def qemu_stream(data: bytes) -> None:
    found = streamscan.scan(data)
    assert sum(found.page_bytes.values()) <= len(data) * PAGE_SIZE


# ---- a hand-over


@target
def handover_journal(data: bytes) -> None:
    """Sealed where the first byte is odd: a slot's digest, then its text."""
    if data[:1] and data[0] & 1:
        text = data[1:].rstrip(b"\0")
        data = b"\0" + blake3(text).digest(32) + text
    with tempfile.TemporaryDirectory(prefix="lazymem-fuzz-") as folder:
        Path(folder, journal.NAME).write_bytes(data[1:])
        found = journal.read(Path(folder))
    if found is None:
        return
    assert all(isinstance(text, str) for text in (found.role, found.handover, found.state))
    assert isinstance(found.details, dict)


@target
def handover_messages(data: bytes) -> None:
    """What a stranger says to `lazymem send`; where the first byte is odd, one message of the right length."""
    if data[:1] and data[0] & 1:
        data = b"\0" + (len(data) - 1).to_bytes(4, "little") + data[1:]
    receiver = messages.Receiver()
    for at in range(1, len(data), 997):
        for message in receiver.feed(data[at : at + 997]):
            assert messages.Receiver().feed(messages.encode(message)) == [message]


# ---- small things


@target
def meta_record(data: bytes) -> None:
    """meta.json and state.json of the store's folders."""
    with tempfile.NamedTemporaryFile(prefix="lazymem-fuzz-") as file:
        file.write(data)
        file.flush()
        found = maybe_record(Path(file.name))
    assert found is None or isinstance(found, dict)


@target
def server_address(data: bytes) -> None:
    parse_server(data.decode(errors="surrogateescape"))
