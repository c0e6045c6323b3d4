"""The receive buffer: linear, frugal, bounded."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.errors import LocalProtocolError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.wire import limits
from lazymem.wire.codec import COPY_UP_TO_BYTES, encode
from lazymem.wire.frame import Role
from lazymem.wire.messages import Encoding, Pages, Ping
from lazymem.wire.receivebuffer import ReceiveBuffer


def one(buffer: ReceiveBuffer) -> Pages:
    message = buffer.next_message()
    assert isinstance(message, Pages)
    return message


def test_small_page_data_is_its_own_bytes() -> None:
    """A view would keep a whole socket read alive for one page."""
    buffer = ReceiveBuffer(Role.SERVER)
    buffer.feed(encode(Pages(1, PageRange(0, 1), Encoding.RAW, bytes(PAGE_SIZE))))
    assert type(one(buffer).data) is bytes


def test_large_page_data_is_not_copied() -> None:
    buffer = ReceiveBuffer(Role.SERVER)
    data = os.urandom(limits.MAX_PAGE_DATA_BYTES)
    frame = encode(Pages(1, PageRange(0, 256), Encoding.RAW, data))
    buffer.feed(frame)
    found = one(buffer).data
    assert isinstance(found, memoryview)
    assert found.obj is frame
    assert found == data
    assert len(data) > COPY_UP_TO_BYTES


def test_a_large_frame_in_pieces_stays_as_it_is_when_more_arrives() -> None:
    """The gathered buffer belongs to the message; the next frame takes another."""
    buffer = ReceiveBuffer(Role.SERVER)
    first, second = os.urandom(limits.MAX_PAGE_DATA_BYTES), os.urandom(limits.MAX_PAGE_DATA_BYTES)
    stream = b"".join(encode(Pages(1, PageRange(0, 256), Encoding.RAW, data)) for data in (first, second))
    found = []
    for at in range(0, len(stream), 65536):
        buffer.feed(stream[at : at + 65536])
        while (message := buffer.next_message()) is not None:
            assert isinstance(message, Pages)
            found.append(message.data)
    assert found == [first, second]


def test_many_small_frames_in_one_piece() -> None:
    buffer = ReceiveBuffer(Role.CLIENT)
    frames = [Ping(number) for number in range(1, 5001)]
    buffer.feed(b"".join(encode(frame) for frame in frames))
    assert [buffer.next_message() for _ in frames] == frames
    assert buffer.next_message() is None
    assert len(buffer) == 0


def test_nobody_asks() -> None:
    buffer = ReceiveBuffer(Role.CLIENT)
    piece = encode(Ping(1)) * 65536
    while len(buffer) <= limits.MAX_UNREAD_BYTES:
        buffer.feed(piece)
    with pytest.raises(LocalProtocolError, match="without asking"):
        buffer.feed(piece)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.lists(st.tuples(st.booleans(), st.integers(1, 90_000)), max_size=20),
)
def test_what_the_socket_puts_into_the_room_is_what_would_have_been_fed(
    counts: list[int], steps: list[tuple[bool, int]]
) -> None:
    """Whatever mixture of both: the same messages, and `missing` is never more than what then brings one."""
    sent = [
        Pages(number, PageRange(0, count), Encoding.RAW, bytes([number]) * (count * PAGE_SIZE))
        for number, count in enumerate(counts, 1)
    ]
    stream = b"".join(map(encode, sent))
    buffer, found, at = ReceiveBuffer(Role.SERVER), [], 0
    for wants_room, length in itertools.chain(steps, itertools.cycle([(False, 30_000), (True, 50_000)])):
        if at == len(stream):
            break
        piece = stream[at : at + length]
        assert buffer.missing <= len(stream) - at
        room = buffer.maybe_room() if wants_room else None
        if room is None:
            buffer.feed(piece)
        else:
            piece = piece[: len(room)]
            room[: len(piece)] = piece
            buffer.filled(len(piece))
        at += len(piece)
        while (message := buffer.next_message()) is not None:
            found.append(message)
    assert found == sent
    assert len(buffer) == 0
    assert buffer.missing == 1


def test_there_is_no_room_before_the_header_was_found_right() -> None:
    buffer = ReceiveBuffer(Role.SERVER)
    frame = encode(Pages(1, PageRange(0, 256), Encoding.RAW, bytes(limits.MAX_PAGE_DATA_BYTES)))
    for at in range(10):
        buffer.feed(frame[at : at + 1])
        assert buffer.next_message() is None
        assert buffer.maybe_room() is None
    buffer.feed(frame[10:17])
    assert buffer.next_message() is None
    room = buffer.maybe_room()
    assert room is not None
    assert len(room) == buffer.missing == len(frame) - 17
