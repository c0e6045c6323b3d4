"""A control connection: its messages are whole, or there is no connection any more."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from lazymem.errors import ServerUnreachableError
from lazymem.handover import channel, messages
from lazymem.handover.channel import Channel

LONG = messages.Refused("x" * (messages.MAX_MESSAGE_BYTES - 100))


def _two() -> tuple[Channel, socket.socket]:
    """A channel, and the other end of its connection, which takes less than one long message before it is read."""
    ours, theirs = socket.socketpair()
    for end, option in ((ours, socket.SO_SNDBUF), (theirs, socket.SO_RCVBUF)):
        end.setsockopt(socket.SOL_SOCKET, option, 4096)
    return Channel(trio.SocketStream(trio.socket.from_stdlib_socket(ours))), theirs


def _all_of(connection: socket.socket) -> bytes:
    """What comes until its end."""
    connection.settimeout(60)
    data = b""
    while more := connection.recv(1 << 16):
        data += more
    return data


@pytest.mark.parametrize("cancelled", [True, False])
async def test_behind_half_a_message_nothing_is_sent(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
) -> None:
    """By a clock that stands until half of it is sent, and nothing else can happen."""
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 30 if cancelled else 0.05)
    found, other = _two()
    with other:
        if cancelled:
            with trio.move_on_after(0.05):
                await found.send(LONG)
        else:
            with pytest.raises(ServerUnreachableError):
                await found.send(LONG)
        with pytest.raises(ServerUnreachableError):
            await found.send(messages.Ping())
        with pytest.raises(ServerUnreachableError):
            await found.receive()
        data = await trio.to_thread.run_sync(_all_of, other)
        assert 0 < len(data) < messages.MAX_MESSAGE_BYTES
        assert messages.encode(LONG).startswith(data)


async def test_who_waits_for_his_turn_to_send_may_be_cancelled() -> None:
    found, other = _two()
    with other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found.send, LONG)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.01):
                await found.send(messages.Ping())
            data = await trio.to_thread.run_sync(_of_length, other, len(messages.encode(LONG)))
        await found.send(messages.Pong())
        await found.aclose()
        assert messages.Receiver().feed(data + _all_of(other)) == [LONG, messages.Pong()]


def _of_length(connection: socket.socket, count: int) -> bytes:
    connection.settimeout(60)
    data = b""
    while len(data) < count:
        data += connection.recv(count - len(data))
    return data
