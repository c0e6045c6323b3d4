"""Who comes to a source: one receiver at a time, told from others by its hand-over's id, and its connections.

Puts what it says into a queue as events; decides nothing but who may come in.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import trio

from lazymem.errors import BusyError, LazymemError, RemoteProtocolError, ServerUnreachableError
from lazymem.handover import messages
from lazymem.handover.channel import Channel, Stream
from lazymem.handover.states import Event

_STATE_CONNECTION_SECONDS = 10.0
"""From READY to the connection that takes the state: it was begun before."""

_EVENTS: dict[type[messages.Message], Event] = {
    messages.Ready: Event.READY,
    messages.Received: Event.RECEIVED,
    messages.Mine: Event.MINE,
    messages.Refused: Event.REFUSED,
    messages.Whole: Event.WHOLE,
}

PutEvent = Callable[[Event, Channel | None, object], Awaitable[None]]
"""An event, the connection that it came over, and the message or a text."""


class Door(Protocol):
    """Who may come in."""

    def admit(self, hello: messages.Hello, *, occupied: bool) -> messages.Message | None:
        """None: it may, and is the receiver from now on. Else what it is told. Does not wait."""
        ...

    async def offer(self) -> messages.Offer: ...

    def arrived(self, stream_bytes: int) -> None:
        """So much of the connection that takes the state is there."""
        ...

    async def warm(self, stream: Stream) -> None:
        """Send what may be had before the receiver is ready."""
        ...

    @property
    def handover(self) -> str: ...


class Receivers:
    """`peer` is the receiver's live connection, or None."""

    def __init__(self, door: Door, put: PutEvent) -> None:
        self._door = door
        self._put = put
        self.peer: Channel | None = None
        self._state: _StateConnection | None = None
        self._state_came = trio.Event()

    async def serve(self, stream: Stream) -> None:
        """A control connection, whose first bytes were read, to its end."""
        channel = Channel(stream)
        try:
            await self._serve(channel)
        except* LazymemError as group:  # gone, nonsense, or a hand-over that cannot be offered
            if self.peer is channel:
                self.peer = None
                await self._put(Event.LOST, channel, str(_first(group)))
        finally:
            with trio.CancelScope(shield=True):
                await channel.aclose()

    async def _serve(self, channel: Channel) -> None:
        hello = await channel.receive()
        if not isinstance(hello, messages.Hello):
            raise RemoteProtocolError("a receiver says hello first")
        refusal = self._door.admit(hello, occupied=self.peer is not None)
        if refusal is not None:
            await channel.send(refusal)
            return
        before, self.peer = self.peer, channel
        if before is not None:
            await before.aclose()
        await channel.send(await self._door.offer())
        if hello.handover:
            await self._put(Event.BACK, channel, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.keep_alive)
            await self._listen(channel)

    async def _listen(self, channel: Channel) -> None:
        while True:
            message = await channel.receive()
            if isinstance(message, messages.Clock):
                await channel.send(messages.Clock(time.time()))
                continue
            if isinstance(message, messages.Arrived):
                self._door.arrived(message.stream_bytes)
                continue
            event = _EVENTS.get(type(message))
            if event is None:
                raise RemoteProtocolError(f"a receiver does not say {type(message).__name__.lower()}")
            await self._put(event, channel, message)

    async def say(self, message: messages.Message) -> None:
        """To the receiver, if it is there."""
        if self.peer is not None:
            with suppress(ServerUnreachableError):
                await self.peer.send(message)

    async def drop(self) -> None:
        """It talks nonsense. Whoever listens to it notices, and says that it is lost."""
        if self.peer is not None:
            await self.peer.aclose()

    async def answers(self) -> bool:
        """Whether the receiver says anything. Waits for it as long as it takes."""
        peer = self.peer
        if peer is None:
            return False
        with suppress(ServerUnreachableError):
            await peer.send(messages.Ping())
            await peer.wait_heard()
            return True
        return False

    # ---- the connection that takes candidates

    async def warm(self, stream: Stream, handover: str) -> None:
        """To its end."""
        if self.peer is not None and handover == self._door.handover:
            await self._door.warm(stream)

    # ---- the connection that takes the device state

    async def keep_for_state(self, stream: Stream, handover: str) -> None:
        """Keep it open until it is of no more use."""
        if self.peer is None or handover != self._door.handover:
            return
        if self._state is not None:
            if self._state.handover == handover:
                return
            self._state.closed.set()  # of a receiver that left before anything was begun
        self._state = kept = _StateConnection(handover, stream)
        self._state_came.set()
        self._state_came = trio.Event()
        await kept.closed.wait()

    async def state_connection(self, handover: str) -> Stream:
        """
        Raises:
            BusyError: none comes.
        """
        with trio.move_on_after(_STATE_CONNECTION_SECONDS):
            while self._state is None or self._state.handover != handover:
                await self._state_came.wait()
        if self._state is None or self._state.handover != handover:
            raise BusyError("the destination makes no connection for the device state")
        return self._state.stream

    def close(self) -> None:
        if self._state is not None:
            self._state.closed.set()


class _StateConnection:
    """The one that is kept: as long as it is not `closed`."""

    def __init__(self, handover: str, stream: Stream) -> None:
        self.handover = handover
        self.stream = stream
        self.closed = trio.Event()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner
