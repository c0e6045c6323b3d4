"""The receive buffer: linear, frugal, bounded."""

from __future__ import annotations

import os

import pytest

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
