"""Frames: each one whole, byte by byte, with bytes behind it, and a little wrong."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lazymem.errors import LocalProtocolError, RemoteProtocolError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire import limits
from lazymem.wire.codec import FRAME_TYPES, encode, encode_parts, lone_range, raw_head, zero_frame
from lazymem.wire.frame import HEADER, HEADER_BYTES, MAX_PAYLOAD_BYTES, RULES, FrameType, Role
from lazymem.wire.messages import (
    Cancel,
    Digests,
    Encoding,
    Error,
    ErrorCode,
    Fetch,
    FetchDigests,
    FetchFlag,
    FileData,
    Goodbye,
    Hello,
    Level,
    Message,
    Packed,
    Pages,
    Ping,
    PublishedFile,
    ReadFile,
    StoreFile,
    Welcome,
)
from lazymem.wire.receivebuffer import ReceiveBuffer
from tests.support.wiremessages import CLIENT_MESSAGES, SAMPLES, SERVER_MESSAGES, WELCOME

EACH = pytest.mark.parametrize(("sender", "message"), SAMPLES, ids=lambda value: type(value).__name__)


def decoded(sender: Role, data: bytes) -> list[Message]:
    """All messages in `data`, fed at once."""
    buffer = ReceiveBuffer(sender)
    buffer.feed(data)
    return drain(buffer)


def drain(buffer: ReceiveBuffer) -> list[Message]:
    found = []
    while (message := buffer.next_message()) is not None:
        found.append(message)
    return found


def test_the_samples_hold_every_frame_type() -> None:
    assert {FRAME_TYPES[type(message)] for _, message in SAMPLES} == set(FrameType) == set(RULES)


@EACH
def test_whole(sender: Role, message: Message) -> None:
    assert decoded(sender, encode(message)) == [message]


@EACH
def test_byte_by_byte(sender: Role, message: Message) -> None:
    frame = encode(message)[:20000]
    rest = encode(message)[20000:]
    buffer = ReceiveBuffer(sender)
    for at in range(len(frame) - 1):
        buffer.feed(frame[at : at + 1])
        assert buffer.next_message() is None
    buffer.feed(frame[-1:] + rest)
    assert drain(buffer) == [message]
    assert len(buffer) == 0


@EACH
def test_with_bytes_behind(sender: Role, message: Message) -> None:
    frame = encode(message)
    buffer = ReceiveBuffer(sender)
    buffer.feed(frame + frame + frame[:7])
    assert drain(buffer) == [message, message]
    assert len(buffer) == 7
    buffer.feed(frame[7:])
    assert drain(buffer) == [message]


@EACH
def test_cut_in_two_at_every_place_of_its_head(sender: Role, message: Message) -> None:
    frame = encode(message)
    for at in range(1, min(len(frame), 120)):
        buffer = ReceiveBuffer(sender)
        buffer.feed(frame[:at])
        assert buffer.next_message() is None
        buffer.feed(frame[at:] + frame)
        assert drain(buffer) == [message, message]


@given(message=CLIENT_MESSAGES, pieces=st.lists(st.integers(1, 40), max_size=5))
def test_client_messages_round_trip(message: Message, pieces: list[int]) -> None:
    assert fed_in_pieces(Role.CLIENT, encode(message), pieces) == [message]


@given(message=SERVER_MESSAGES, pieces=st.lists(st.integers(1, 5000), max_size=5))
def test_server_messages_round_trip(message: Message, pieces: list[int]) -> None:
    assert fed_in_pieces(Role.SERVER, encode(message), pieces) == [message]


def fed_in_pieces(sender: Role, data: bytes, pieces: list[int]) -> list[Message]:
    buffer = ReceiveBuffer(sender)
    found = []
    for size in [*pieces, len(data)]:
        buffer.feed(data[:size])
        data = data[size:]
        found.extend(drain(buffer))
    return found


@EACH
def test_the_other_side_may_not_send_it(sender: Role, message: Message) -> None:
    if sender.peer in RULES[FRAME_TYPES[type(message)]].senders:
        assert decoded(sender.peer, encode(message)) == [message]
    else:
        with pytest.raises(RemoteProtocolError, match="does not send"):
            decoded(sender.peer, encode(message))


@EACH
def test_unknown_flags_and_reserved_bits_are_refused(sender: Role, message: Message) -> None:
    frame = bytearray(encode(message))
    for at, bit in [(5, 0x80), (5, 0x08), (6, 0x01), (7, 0x80)]:
        changed = frame.copy()
        changed[at] |= bit
        with pytest.raises(RemoteProtocolError, match="flags"):
            decoded(sender, bytes(changed))


@EACH
def test_ids_are_where_they_belong(sender: Role, message: Message) -> None:
    rule = RULES[FRAME_TYPES[type(message)]]
    frame = bytearray(encode(message))
    frame[8:16] = struct.pack("<Q", 0 if rule.has_id else 9)
    if rule.has_id is None:
        assert len(decoded(sender, bytes(frame))) == 1
    else:
        with pytest.raises(RemoteProtocolError, match="with id"):
            decoded(sender, bytes(frame))


@pytest.mark.parametrize("frame_type", FrameType, ids=lambda value: value.name)
def test_lengths_are_refused_from_the_header_alone(frame_type: FrameType) -> None:
    """Nothing of an oversized or undersized payload has to arrive, so nothing of it is ever kept."""
    rule = RULES[frame_type]
    sender = next(iter(rule.senders))
    for length in {rule.min_bytes - 1, rule.max_bytes + 1, 2**32 - 1} - {-1}:
        with pytest.raises(RemoteProtocolError, match=f"{frame_type.name} of {length} bytes"):
            decoded(sender, HEADER.pack(length, frame_type, 0, 0, 1))
    assert rule.max_bytes <= MAX_PAYLOAD_BYTES <= (1 << 20) + 8192


def test_what_a_server_has_to_hold_of_a_client_is_small() -> None:
    assert max(rule.max_bytes for rule in RULES.values() if Role.CLIENT in rule.senders) <= 16 * 1024


@pytest.mark.parametrize("number", [0, 18, 200, 255])
def test_unknown_frame_types_are_refused(number: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"unknown frame type {number}"):
        decoded(Role.CLIENT, HEADER.pack(0, number, 0, 0, 0))


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello"])
def test_other_protocols_are_refused(greeting: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decoded(Role.CLIENT, greeting)


def payload_changed(message: Message, offset: int, new: bytes) -> bytes:
    """The frame with some payload bytes replaced."""
    frame = bytearray(encode(message))
    at = HEADER_BYTES + offset
    frame[at : at + len(new)] = new
    return bytes(frame)


def resized(message: Message, more: bytes = b"", fewer: int = 0) -> bytes:
    """The frame with a payload that is longer or shorter, and a header that says so."""
    frame = encode(message)
    payload = frame[HEADER_BYTES : len(frame) - fewer] + more
    return HEADER.pack(len(payload), *HEADER.unpack_from(frame)[1:]) + payload


FETCH = Fetch(1, (PageRange(5, 2), PageRange(9, 3)))
RAW = Pages(1, PageRange(5, 1), Encoding.RAW, b"x" * PAGE_SIZE)
STORE = StoreFile(1, PublishedFile.WORKING_SET, 10, 20, b"0123456789")
DIGESTED = Pages(1, PageRange(5, 2), Encoding.ZSTD, b"compressed", b"d" * 32)

NEAR_MISSES = {
    "hello magic": (Role.CLIENT, payload_changed(Hello("web"), 0, b"lazymem ")),
    "hello versions": (Role.CLIENT, payload_changed(Hello("web"), 8, struct.pack("<HH", 2, 1))),
    "hello version 0": (Role.CLIENT, payload_changed(Hello("web"), 8, struct.pack("<HH", 0, 1))),
    "hello name not UTF-8": (Role.CLIENT, payload_changed(Hello("web"), 16, b"\xff")),
    "hello name with slash": (Role.CLIENT, payload_changed(Hello("web"), 16, b"/")),
    "hello name with newline": (Role.CLIENT, payload_changed(Hello("web"), 16, b"\n")),
    "welcome hashed 2": (Role.SERVER, payload_changed(WELCOME, 2, b"\x02")),
    "welcome limit 0": (Role.SERVER, payload_changed(WELCOME, 8, bytes(4))),
    "welcome ram 0": (Role.SERVER, payload_changed(WELCOME, 20, bytes(8))),
    "welcome ram odd": (Role.SERVER, payload_changed(WELCOME, 20, b"\x01")),
    "welcome name length": (Role.SERVER, payload_changed(WELCOME, 76, b"\x04")),
    "welcome too long": (Role.SERVER, resized(WELCOME, more=b"x")),
    "welcome manifest length": (Role.SERVER, payload_changed(WELCOME, 80, bytes(4))),
    "welcome hashed without manifest": (
        Role.SERVER,
        payload_changed(replace(WELCOME, hashed=False, manifest=b""), 2, b"\x01"),
    ),
    "fetch cut range": (Role.CLIENT, resized(FETCH, fewer=1)),
    "fetch count 0": (Role.CLIENT, payload_changed(FETCH, 8, bytes(4))),
    "fetch overlapping": (Role.CLIENT, payload_changed(FETCH, 12, struct.pack("<Q", 6))),
    "fetch descending": (Role.CLIENT, payload_changed(FETCH, 12, struct.pack("<Q", 1))),
    "fetch beyond any RAM": (Role.CLIENT, payload_changed(FETCH, 12, struct.pack("<Q", 2**63))),
    "fetch of too much": (Role.CLIENT, payload_changed(FETCH, 20, struct.pack("<I", 2**32 - 1))),
    "pages count 0": (Role.SERVER, payload_changed(RAW, 8, bytes(4))),
    "pages count 257": (Role.SERVER, payload_changed(RAW, 8, struct.pack("<I", 257))),
    "pages count 2": (Role.SERVER, payload_changed(RAW, 8, struct.pack("<I", 2))),
    "pages beyond any RAM": (Role.SERVER, payload_changed(RAW, 0, struct.pack("<Q", 2**64 - 1))),
    "pages unknown encoding": (Role.SERVER, payload_changed(RAW, 12, b"\x03")),
    "pages zero with data": (Role.SERVER, payload_changed(RAW, 12, b"\x00")),
    "pages zstd not smaller": (Role.SERVER, payload_changed(RAW, 12, b"\x02")),
    "pages reserved": (Role.SERVER, payload_changed(RAW, 14, b"\x01")),
    "pages one byte more": (Role.SERVER, resized(RAW, more=b"x")),
    "pages one byte less": (Role.SERVER, resized(RAW, fewer=1)),
    "pages cut digests": (Role.SERVER, resized(DIGESTED, fewer=20)),
    "pages no data behind digests": (Role.SERVER, resized(DIGESTED, fewer=10)),
    "fetch digests level": (Role.CLIENT, payload_changed(FetchDigests(1, Level.LEAF, 0, 1), 0, b"\x02")),
    "fetch digests count": (Role.CLIENT, payload_changed(FetchDigests(1, Level.LEAF, 0, 1), 4, bytes(4))),
    "digests of half a digest": (Role.SERVER, resized(Digests(1, Level.LEAF, 0, bytes(32)), fewer=8)),
    "digests of a leaf too long": (Role.SERVER, resized(Digests(1, Level.LEAF, 0, bytes(4096)), more=bytes(16))),
    "digests reserved": (Role.SERVER, payload_changed(Digests(1, Level.LEAF, 0, bytes(32)), 4, b"\x01")),
    "read file unknown": (Role.CLIENT, payload_changed(ReadFile(1, PublishedFile.VMSTATE, 0, 1), 0, b"\x04")),
    "read file of nothing": (Role.CLIENT, payload_changed(ReadFile(1, PublishedFile.VMSTATE, 0, 1), 4, bytes(4))),
    "read file of too much": (
        Role.CLIENT,
        payload_changed(ReadFile(1, PublishedFile.VMSTATE, 0, 1), 4, struct.pack("<I", (1 << 20) + 1)),
    ),
    "store the vmstate": (Role.CLIENT, payload_changed(STORE, 0, b"\x01")),
    "store an unknown file": (Role.CLIENT, payload_changed(STORE, 0, b"\x03")),
    "store beyond the file's end": (Role.CLIENT, payload_changed(STORE, 4, struct.pack("<I", 11))),
    "store with an offset that wraps": (Role.CLIENT, payload_changed(STORE, 4, struct.pack("<I", 2**32 - 5))),
    "store too large a file": (Role.CLIENT, payload_changed(STORE, 8, struct.pack("<I", (1 << 20) + 1))),
    "store reserved": (Role.CLIENT, payload_changed(STORE, 12, b"\x01")),
    "store nothing": (Role.CLIENT, resized(STORE, fewer=10)),
    "error unknown code": (Role.SERVER, payload_changed(Error(1, ErrorCode.BUSY, ""), 0, b"\x01\x00")),
    "error reserved": (Role.SERVER, payload_changed(Error(1, ErrorCode.BUSY, ""), 2, b"\x01")),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused(name: str) -> None:
    sender, frame = NEAR_MISSES[name]
    with pytest.raises(RemoteProtocolError):
        decoded(sender, frame)


REFUSED_TO_SEND: list[Message] = [
    Hello("a/b"),
    Hello("x" * 256),
    Hello("\ud800"),
    Hello("web", 2, 1),
    Hello("web", 1, 65536),
    Fetch(0, (PageRange(0, 1),)),
    Fetch(2**64, (PageRange(0, 1),)),
    Fetch(1, (PageRange(0, 1),), FetchFlag(8)),
    Fetch(1, (PageRange(0, 1), PageRange(4, 1)), FetchFlag(8)),
    Packed(1, 5, 0, Encoding.RAW, b""),
    Packed(1, 5, 257, Encoding.ZSTD, b"x"),
    Packed(1, 5, 1, Encoding.ZERO, b"x"),
    Packed(1, 5, 2, Encoding.RAW, bytes(PAGE_SIZE)),
    Packed(1, 5, 1, Encoding.ZSTD, bytes(PAGE_SIZE)),
    Packed(1, limits.MAX_PAGES, 1, Encoding.ZSTD, b"x"),
    Packed(0, 5, 1, Encoding.RAW, bytes(PAGE_SIZE)),
    Fetch(1, ()),
    Fetch(1, (PageRange(5, 1), PageRange(5, 1))),
    Fetch(1, tuple(PageRange(2 * at, 1) for at in range(limits.MAX_RANGES + 1))),
    Fetch(1, (PageRange(0, limits.MAX_REQUEST_PAGES + 1),)),
    Fetch(1, (PageRange(limits.MAX_PAGES, 1),)),
    Pages(0, PageRange(5, 1), Encoding.RAW, bytes(PAGE_SIZE)),
    Pages(1, PageRange(5, 1), Encoding.RAW, b"short"),
    Pages(1, PageRange(5, 1), Encoding.ZERO, b"x"),
    Pages(1, PageRange(5, 1), Encoding.ZERO, b"", bytes(16)),
    Pages(1, PageRange(5, 257), Encoding.ZERO),
    Pages(1, PageRange(5, 1), Encoding.ZSTD, b""),
    Pages(1, PageRange(5, 1), Encoding.RAW, bytes(PAGE_SIZE), bytes(15)),
    FetchDigests(1, Level.LEAF, 0, 0),
    FetchDigests(1, Level.LEAF, 0, limits.MAX_DIGEST_LEAVES + 1),
    FetchDigests(1, Level.LEAF, -1, 1),
    Digests(1, Level.LEAF, 0, b""),
    Digests(1, Level.LEAF, 0, bytes(limits.MAX_LEAF_BYTES + 16)),
    ReadFile(1, PublishedFile.VMSTATE, -1, 1),
    ReadFile(1, PublishedFile.VMSTATE, 0, limits.MAX_FILE_DATA_BYTES + 1),
    FileData(1, bytes(limits.MAX_FILE_DATA_BYTES + 1)),
    StoreFile(1, PublishedFile.VMSTATE, 0, 1, b"x"),
    StoreFile(1, PublishedFile.WORKING_SET, 0, 1, b""),
    StoreFile(1, PublishedFile.WORKING_SET, 1, 1, b"x"),
    StoreFile(1, PublishedFile.WORKING_SET, -1, 1, b"x"),
    StoreFile(1, PublishedFile.WORKING_SET, 0, limits.MAX_STORED_BYTES + 1, b"x"),
    StoreFile(1, PublishedFile.WORKING_SET, 0, 1 << 20, bytes(limits.MAX_STORE_PIECE_BYTES + 1)),
    Cancel(0),
]


@pytest.mark.parametrize("message", REFUSED_TO_SEND, ids=lambda message: type(message).__name__)
def test_what_a_peer_would_refuse_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)


def test_long_and_dirty_texts_become_one_short_clean_line() -> None:
    [error] = decoded(Role.SERVER, encode(Error(1, ErrorCode.BUSY, "ä" * 2000 + "\n")))
    assert error == Error(1, ErrorCode.BUSY, "ä" * (limits.MAX_TEXT_BYTES // 2))
    [goodbye] = decoded(Role.SERVER, encode(Goodbye("one\x1b[2Jtwo\nthree")))
    assert goodbye == Goodbye("one?[2Jtwo?three")


def test_unknown_capabilities_of_a_newer_peer_are_ignored() -> None:
    frame = payload_changed(Hello("web"), 12, b"\xff\xff\xff\xff")
    assert decoded(Role.CLIENT, frame) == [Hello("web")]


@settings(max_examples=300)
@given(data=st.binary(max_size=400), sender=st.sampled_from(Role))
def test_random_bytes_raise_nothing_but_remote_errors(data: bytes, sender: Role) -> None:
    try:
        decoded(sender, data)
    except RemoteProtocolError:
        return


@settings(max_examples=400)
@given(
    message=st.one_of(CLIENT_MESSAGES.map(lambda m: (Role.CLIENT, m)), SERVER_MESSAGES.map(lambda m: (Role.SERVER, m))),
    flips=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 7)), min_size=1, max_size=4),
)
def test_altered_frames_are_refused_or_are_other_legal_messages(
    message: tuple[Role, Message], flips: list[tuple[int, int]]
) -> None:
    sender, original = message
    frame = bytearray(encode(original))
    for at, bit in flips:
        frame[at % len(frame)] ^= 1 << bit
    try:
        found = decoded(sender, bytes(frame))
    except RemoteProtocolError:
        return
    for again in found:
        if not isinstance(again, Hello | Welcome):  # these drop capabilities that we do not know
            assert decoded(sender, encode(again)) == [again]


def test_pieces_are_the_frame() -> None:
    for count in (1, 5, 256):
        for digests in (b"", bytes(16 * count)):
            message = Pages(7, PageRange(3, count), Encoding.RAW, memoryview(bytes(count * PAGE_SIZE)), digests, True)
            assert b"".join(encode_parts(message)) == encode(message)
    assert encode_parts(Ping(3)) == (encode(Ping(3)),)
    with pytest.raises(LocalProtocolError):
        encode_parts(Pages(7, PageRange(3, 9), Encoding.RAW, bytes(8 * PAGE_SIZE)))


@pytest.mark.parametrize("count", [1, 32, 256])
def test_frames_by_the_shortest_way_are_the_same(count: int) -> None:
    pages, data = PageRange(77, count), bytes(range(256)) * 16 * count
    assert raw_head(9, 77, count) + data == encode(Pages(9, pages, Encoding.RAW, data, final=True))
    assert zero_frame(9, 77, count) == encode(Pages(9, pages, Encoding.ZERO, final=True))


@pytest.mark.parametrize("flags", list(range(4)))
def test_a_lone_range_is_what_the_common_way_makes_of_it(flags: int) -> None:
    fetch = Fetch(5, (PageRange(8, 3),), FetchFlag(flags))
    assert lone_range(encode(fetch)) == (5, flags, 8, 3)


@pytest.mark.parametrize("at", range(28))
def test_a_lone_range_with_a_wrong_byte_is_none_or_a_legal_one(at: int) -> None:
    """Whatever it lets through, the common way lets through as the same request."""
    good = encode(Fetch(5, (PageRange(8, 3),)))
    for wrong in (good[:at] + bytes([value]) + good[at + 1 :] for value in (0, 1, 4, 128, 255)):
        found = lone_range(wrong)
        buffer = ReceiveBuffer(Role.CLIENT)
        buffer.feed(wrong)
        try:
            message = buffer.next_message()
        except RemoteProtocolError:
            message = None
        if isinstance(message, Fetch) and message.flags & FetchFlag.PACKED:
            assert found is None, "whether it may be allowed the common way knows"
        elif isinstance(message, Fetch):
            assert found == (message.id, message.flags, message.ranges[0].start, message.ranges[0].count)
        elif found is not None:
            assert found[2] + found[3] > 1 << 20, "beyond every RAM: `lone_fetch` refuses it"
    assert lone_range(good[:at]) is None
    assert lone_range(good + b"\x00") is None
