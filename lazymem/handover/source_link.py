"""The destination's way to the source: one control connection, made again and again until the source has let go."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from lazymem.errors import RemoteProtocolError, ServerRefusedError, ServerUnreachableError, TlsError, UsageError
from lazymem.handover import messages
from lazymem.handover.arriving import boot_id
from lazymem.handover.channel import SILENCE_SECONDS, Channel, Stream, dial
from lazymem.handover.states import Event
from lazymem.settings import Endpoint, TlsSettings

_RETRY_SECONDS = (0.1, 2.0)
"""Between tries: the first pause and the longest. They double."""

_CLOCK_LOOKS = 5

_EVENTS: dict[type[messages.Message], Event] = {
    messages.Given: Event.GIVEN,
    messages.Done: Event.DONE,
    messages.Void: Event.VOID,
}

OnEvent = Callable[[Event, object], Awaitable[None]]
OnStopped = Callable[[list[int]], None]
"""The guest stands: which pages its load will read."""


class SourceLink:
    """`handover`: its id; `clock_ahead_seconds`: how much the source's clock is ahead of ours."""

    def __init__(
        self, endpoint: Endpoint, say: Callable[[str], None], handover: str = "", tls: TlsSettings | None = None
    ) -> None:
        self.endpoint = endpoint
        self.handover = handover
        self.clock_ahead_seconds = 0.0
        self.let_go = False
        """The source has said its last word: it has let go, or keeps the guest, or knows nothing of this."""
        self.objection = ""
        """What whoever answers at that address said last instead of taking us for its receiver; empty: nobody answers,
        or all is well."""
        self.tries_begun = self.tries_ended = 0
        """To connect again."""
        self._say = say
        self._tls = tls
        self._is_done = False
        self._channel: Channel | None = None

    @property
    def connected(self) -> bool:
        return self._channel is not None

    async def first(self) -> messages.Offer:
        """Connect for the first time.

        Raises:
            TlsError: it is not the one that is meant, or does not believe us.
            ServerUnreachableError: nobody is there.
            ServerRefusedError: somebody is, and says no.
            RemoteProtocolError: it is no lazymem send.
        """
        channel = await self._connect()
        answer = await self._greeted(channel)
        if isinstance(answer, messages.No):
            await channel.aclose()
            raise ServerRefusedError(f"{self.endpoint}: {answer.text}")
        if not isinstance(answer, messages.Offer) or not _makes_sense(answer):
            await channel.aclose()
            raise RemoteProtocolError(f"{self.endpoint} offers nothing that this lazymem understands")
        self.handover = answer.handover
        if answer.boot_id != boot_id():
            await self._set_clock(channel)
        self._channel = channel
        return answer

    async def _connect(self) -> Channel:
        return Channel(await dial(self.endpoint, messages.CONTROL, self._tls))

    async def _greeted(self, channel: Channel) -> messages.Message:
        version = messages.COMES_BACK_VERSION if self.handover else messages.VERSION
        await channel.send(messages.Hello(version, boot_id(), self.handover))
        return await channel.receive()

    async def _set_clock(self, channel: Channel) -> None:
        """By the quickest of some questions, as NTP does (RFC 5905): right to half of its round trip."""
        looks = []
        for _ in range(_CLOCK_LOOKS):
            asked = time.time()
            await channel.send(messages.Clock())
            answer = await channel.receive()
            heard = time.time()
            if not isinstance(answer, messages.Clock):
                raise RemoteProtocolError("the source does not tell its clock")
            looks.append((heard - asked, answer.seconds - (asked + heard) / 2))
        self.clock_ahead_seconds = min(looks)[1]

    async def open_state(self) -> Stream:
        """The connection that brings the device state.

        Raises:
            ServerUnreachableError: nobody is there any more.
        """
        return await dial(self.endpoint, messages.STATE + bytes.fromhex(self.handover), self._tls)

    async def open_warm(self) -> Stream:
        """The connection that brings candidates.

        Raises:
            ServerUnreachableError: nobody is there any more.
        """
        return await dial(self.endpoint, messages.WARM + bytes.fromhex(self.handover), self._tls)

    async def say(self, message: messages.Message) -> None:
        """To the source, if it is there; else it asks when it is."""
        if self._channel is not None:
            with suppress(ServerUnreachableError):
                await self._channel.send(message)

    async def keep_alive(self) -> None:
        """Be heard from while nobody listens yet, until cancelled."""
        if self._channel is not None:
            await self._channel.keep_alive()

    async def wait_lost(self, silence_seconds: float = SILENCE_SECONDS) -> None:
        """While nobody listens yet: until the source is gone, or silent, or says what it has no reason to say."""
        if self._channel is not None:
            with suppress(ServerUnreachableError, RemoteProtocolError, TlsError):
                await self._channel.receive(silence_seconds)

    async def drop(self) -> None:
        """It talks nonsense."""
        if self._channel is not None:
            await self._channel.aclose()

    async def run(self, on_event: OnEvent, on_stopped: OnStopped) -> None:
        """Listen, and connect again when that ends, until the source has nothing more to say to us, or cancelled."""
        pause, longest = _RETRY_SECONDS
        while True:
            if self._channel is not None:
                pause = _RETRY_SECONDS[0]
                await self._listen(self._channel, on_event, on_stopped)
                self._channel = None
                if self._is_done:
                    return
                await on_event(Event.LOST, None)
            await trio.sleep(pause)
            pause = min(2 * pause, longest)
            await self._try_again(on_event)

    async def _try_again(self, on_event: OnEvent) -> None:
        self.tries_begun += 1
        try:
            objection = await self._again(on_event)
        except ServerUnreachableError:
            objection = ""
        except (RemoteProtocolError, TlsError, UsageError) as error:
            objection = str(error)
        self.tries_ended += 1
        if objection and objection != self.objection:  # once, however often it is tried
            self._say(objection if str(self.endpoint) in objection else f"{self.endpoint}: {objection}")
        self.objection = objection

    async def _again(self, on_event: OnEvent) -> str:
        """What speaks against us, or empty."""
        channel = await self._connect()
        answer = None
        try:
            answer = await self._greeted(channel)
        finally:
            if not isinstance(answer, messages.Offer):
                await channel.aclose()
        if isinstance(answer, messages.Offer):
            self._channel = channel
            await on_event(Event.BACK, None)
        elif isinstance(answer, messages.Void):
            self.let_go = True
            await on_event(Event.VOID, answer)
        elif isinstance(answer, messages.No):
            if answer.unknown and not self.let_go:
                self.let_go = True
                await on_event(Event.LOST, None)
            return answer.text
        return ""

    async def _listen(self, channel: Channel, on_event: OnEvent, on_stopped: OnStopped) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.keep_alive)
            with suppress(ServerUnreachableError, RemoteProtocolError, TlsError, UsageError):
                while True:
                    message = await channel.receive()
                    if isinstance(message, messages.Stopped):
                        on_stopped(message.load_reads)
                        continue
                    event = _EVENTS.get(type(message))
                    if event is None:
                        break
                    self.let_go |= event in (Event.VOID, Event.DONE)
                    await on_event(event, message)
                    if event is Event.DONE:
                        self._is_done = True
                        break
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await channel.aclose()


def _makes_sense(offer: messages.Offer) -> bool:
    """Its id goes into names and its path to the system."""
    if offer.version != messages.VERSION or offer.ram_bytes <= 0 or "\0" in offer.ram_path:
        return False
    if not 0 <= offer.warm_seconds <= messages.MAX_WARM_SECONDS:
        return False
    return re.fullmatch(f"[0-9a-f]{{{2 * messages.ID_BYTES}}}", offer.handover) is not None
