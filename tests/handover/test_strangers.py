"""Whoever connects to `lazymem send` and is no receiver: he is dropped, and the source notices nothing."""

from __future__ import annotations

import socket

import pytest
import trio
from msgspec import msgpack

from lazymem.handover import messages
from lazymem.handover.channel import Channel, Stream
from lazymem.handover.receivers import Receivers
from lazymem.handover.states import Event


def said(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text


HELLO = messages.encode(messages.Hello(messages.VERSION, "a boot id"))

STRANGERS: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\1\0",
    "half a message": HELLO[:-3],
    "a message of 4 GiB": b"\xff\xff\xff\xff",
    "no text": said(b'{"say":"\xff\xfe"}'),
    "no JSON": said(b"GET / HTTP/1.1"),
    "another encoding": said(msgpack.encode({"say": "hello"})),
    "brackets without end": said(b"[" * 60000),
    "a number without end": said(b'{"say":"hello","version":' + b"9" * 60000 + b',"boot_id":""}'),
    "half of a surrogate pair": said(b'{"say":"hello","version":1,"boot_id":"\\ud800"}'),
    "a word that is none": said(b'{"say":"mine!"}'),
    "a sender's word": messages.encode(messages.Given()),
    "a decision before hello": messages.encode(messages.Refused()),
    "pings without end": messages.encode(messages.Ping()) * 100,
    "hello, and then nonsense": HELLO + said(b"\xff"),
    "hello, and then a sender's word": HELLO + messages.encode(messages.Done()),
}


class Door:
    handover = "ab" * 16

    def __init__(self) -> None:
        self.admitted = 0

    def admit(self, hello: messages.Hello, *, occupied: bool) -> messages.Message | None:
        self.admitted += 1
        return messages.No("not you") if self.admitted == 1 and hello.boot_id != "a boot id" else None

    async def offer(self) -> messages.Offer:
        await trio.lowlevel.checkpoint()
        return messages.Offer(messages.VERSION, self.handover, 4096, {}, "", "/ram", running=True)

    def arrived(self, stream_bytes: int) -> None:
        raise AssertionError("nobody sends a state here")

    async def warm(self, stream: Stream) -> None:
        raise AssertionError("nobody who is no receiver gets so far")


@pytest.mark.parametrize("name", STRANGERS)
async def test_a_stranger(name: str) -> None:
    events: list[Event] = []

    async def put(event: Event, channel: Channel | None, what: object) -> None:
        await trio.lowlevel.checkpoint()
        events.append(event)

    receivers = Receivers(Door(), put)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    async with ours, trio.open_nursery() as nursery:
        nursery.start_soon(receivers.serve, theirs)
        with trio.fail_after(60):
            await ours.send_all(STRANGERS[name])
            await ours.send_eof()
    assert receivers.peer is None
    assert set(events) <= {Event.LOST}
