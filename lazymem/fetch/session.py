"""One handshake'd connection: frames out at once, messages in, and a dead peer noticed within seconds.

Tasks: whoever calls `run` receives; a writer sends what the kernel did not take at once; a pinger watches. The first of
them that fails ends all. `send` is called from any task and never waits: what is unsent is bounded, since a server that
asks without end and reads no answer would otherwise have us keep them all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import trio

from lazymem.errors import LazymemError, RemoteProtocolError, ServerUnreachableError
from lazymem.fetch.requests import refusal
from lazymem.fetch.stats import LinkCounters
from lazymem.fetch.transport import Transport, is_on_this_host
from lazymem.pages import PageRange
from lazymem.settings import LinkSettings
from lazymem.wire.codec import raw_head
from lazymem.wire.connection import CONNECTION_CLOSED, NEED_DATA, ClientConnection, Event
from lazymem.wire.messages import Error, Fetch, Goodbye, Hello, Message, Ping, Pong, Welcome

MAX_UNSENT_BYTES = 16 << 20
"""Beyond, the server counts as one that does not read. All that we may have open at once of a sane one, 128 requests of
at most 12 KiB, is a tenth of it."""

_UNSENT_FRAME_BYTES = 64
"""What Python adds to the bytes of one."""

OnLone = Callable[[int, int, int, bytes | None], None]


def _nobody(request_id: int, start: int, count: int, maybe_data: bytes | None) -> None:
    raise AssertionError("answers are taken in while the session runs")


class Session:
    """Made by `open_session`."""

    def __init__(
        self,
        transport: Transport,
        connection: ClientConnection,
        welcome: Welcome,
        link: LinkSettings,
        counters: LinkCounters,
    ) -> None:
        self.welcome = welcome
        self.draining = False
        """The server said goodbye: no new requests."""
        self.best_round_trip_seconds = math.inf
        self._transport = transport
        self._connection = connection
        self._link = link
        self._counters = counters
        self._unsent: deque[bytes | memoryview] = deque()
        self._unsent_bytes = 0  # behind the first of them
        self._something_unsent = trio.Event()
        self._last_received = trio.current_time()  # or a little later: `_watch` looks whether it was `_heard`
        self._heard = False
        self._ping_id = 0
        self._ping_sent_at: float | None = None
        self._received_bytes = self._received_before_ping = 0
        self._cause: LazymemError | None = None
        self._on_message: Callable[[Message], None] | None = None
        self._on_lone: OnLone = _nobody
        self.asked: tuple[int, PageRange] = (0, PageRange(0, 1))
        """Id and pages of what `ask` sent last."""
        self._asked_head = b""
        self._held_back = b""
        self._scope = trio.CancelScope()

    @property
    def open_requests(self) -> int:
        return self._connection.open_requests

    @property
    def is_on_this_host(self) -> bool:
        """Whether the server is, or the near end of a tunnel to it."""
        return is_on_this_host(self._transport.fileno())

    def may_request(self) -> bool:
        """Whether the server takes one more request now."""
        if self.draining or self._cause is not None:
            return False
        return self._connection.open_requests < self.welcome.limits.max_requests

    def send(self, message: Message) -> None:
        """Put a message on its way; most often the kernel has it when this returns.

        A broken connection is not reported here: `run` raises.

        Raises:
            LocalProtocolError: the message is not allowed; nothing was sent.
        """
        self._put(self._connection.send(message))

    def _put(self, data: bytes) -> None:
        self._counters.wire_sent_bytes += len(data)
        if self._cause is not None:
            return
        if self._unsent:
            self._unsent.append(data)
            self._unsent_bytes += len(data) + _UNSENT_FRAME_BYTES
            if self._unsent_bytes > MAX_UNSENT_BYTES:
                self.fail(ServerUnreachableError("the server does not read what it is sent"))
            return
        try:
            taken = self._transport.send_nowait(data)
        except ServerUnreachableError as error:
            self.fail(error)
            return
        if taken < len(data):
            self._unsent.append(memoryview(data)[taken:])
            self._something_unsent.set()

    def send_lone(self, fetch: Fetch) -> bool:
        """Send a FETCH of one range if nothing is before it and the server takes it now; False: nothing was done."""
        if self._unsent or self.draining or self._cause is not None:
            return False
        data = self._connection.send_lone(fetch)
        if data is None:
            return False
        self._put(data)
        return True

    def ask(self, request_id: int, pages: PageRange) -> bool:
        """As `send_lone`, but nothing is noted: `end_asked` or `enter_asked` comes before anything else."""
        if self._unsent or self.draining or self._cause is not None or self._on_message is None:
            return False
        maybe_frame = self._connection.maybe_ask(request_id, pages)
        if maybe_frame is None:
            return False
        self._put(maybe_frame)
        self.asked = (request_id, pages)
        self._asked_head = raw_head(request_id, pages.start, pages.count)
        return True

    def maybe_asked_answer(self) -> memoryview | None:
        """The bytes of the pages, if what came is their one frame. Whatever came is kept for `receive_nowait`."""
        try:
            data = self._transport.receive_nowait()
        except LazymemError as error:
            self.fail(error)
            return None
        if data is None:
            return None
        self._held_back = data
        head = self._asked_head
        if len(data) != len(head) + self.asked[1].length_bytes or not data.startswith(head):
            return None
        return memoryview(data)[len(head) :]

    def end_asked(self) -> None:
        """`maybe_asked_answer` gave its answer, and that was right."""
        self._note_received(len(self._held_back))
        self._held_back = b""

    def enter_asked(self, fetch: Fetch) -> None:
        """Note what was asked as if `send_lone` had sent it."""
        self._connection.enter_asked(fetch)

    async def run(self, on_message: Callable[[Message], None], on_lone: OnLone) -> None:
        """Serve until the connection ends; always raises, unless cancelled. The transport is closed afterwards.

        `on_lone`: gets id, first page, count and bytes (None: zeros) of answers that are one frame, of which
        `on_message` hears nothing then.

        Raises:
            ServerUnreachableError: the connection went away, or fell silent.
            RemoteProtocolError: the peer broke the protocol.
            ServerRefusedError: the server ended the connection and said why.
        """
        self._on_message, self._on_lone = on_message, on_lone
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guarded, self._write)
                    nursery.start_soon(self._guarded, self._watch)
                    await self._guarded(self._receive, on_message)
        finally:
            self.close()
        raise self._cause or ServerUnreachableError("connection closed")

    def fileno(self) -> int:
        """The transport's; -1 while nothing may be taken in by `receive_nowait`."""
        return -1 if self._on_message is None or self._cause is not None else self._transport.fileno()

    def receive_nowait(self) -> bool:
        """Handle what has come, without a task switch; False when that was nothing. Between awaits of `run` only."""
        if self._on_message is None or self._cause is not None:
            return False
        try:
            data = self._held_back or self._transport.receive_nowait()
            if data is None:
                return False
            self._held_back = b""
            lone = self._connection.lone_answer(data)
            if lone is None:
                self._take(data, self._on_message)
            else:
                self._note_received(len(data))
                self._on_lone(*lone)
        except LazymemError as error:
            self.fail(error)
        return True

    def close(self) -> None:
        """Drop the connection; `run` raises."""
        self._transport.close()
        self._scope.cancel()

    def fail(self, error: LazymemError) -> None:
        """Keep the first cause, and end `run` with it."""
        if self._cause is None:
            self._cause = error
        self._scope.cancel()

    async def _guarded(self, task: Callable[..., object], *arguments: object) -> None:
        """Run one of the tasks; its failure ends all, and only the first counts."""
        try:
            await task(*arguments)  # type: ignore[misc]
        except LazymemError as error:
            self.fail(error)

    async def _receive(self, on_message: Callable[[Message], None]) -> None:
        self._handle_all(on_message)  # what came right behind the welcome
        while True:
            came = await self._transport.receive_into(self._connection)
            if isinstance(came, bytes):
                self._take(came, on_message)
            elif not came:
                self._take(b"", on_message)
            else:
                self._note_received(came)
                self._connection.filled(came)
                self._handle_all(on_message)

    def _take(self, data: bytes, on_message: Callable[[Message], None]) -> None:
        self._note_received(len(data))
        self._connection.receive_data(data)
        self._handle_all(on_message)

    def _note_received(self, count: int) -> None:
        self._counters.wire_received_bytes += count
        self._received_bytes += count
        self._heard = True

    def _handle_all(self, on_message: Callable[[Message], None]) -> None:
        next_event = self._connection.next_event
        event = next_event()
        while event is not NEED_DATA:
            self._handle(event, on_message)
            event = next_event()

    def _handle(self, event: Event, on_message: Callable[[Message], None]) -> None:
        kind = type(event)
        if event is CONNECTION_CLOSED:
            raise ServerUnreachableError("the server closed the connection")
        if kind is Ping:
            self.send(Pong(event.id))  # type: ignore[union-attr]
        elif kind is Pong:
            self._note_pong(event)  # type: ignore[arg-type]
        elif kind is Goodbye:
            self.draining = True
        elif kind is Error and event.id == 0:  # type: ignore[union-attr]
            raise refusal(event)  # type: ignore[arg-type]
        else:
            on_message(event)  # type: ignore[arg-type]
        if self.draining and not self._connection.open_requests:
            raise ServerUnreachableError("the server said goodbye")

    def _note_pong(self, pong: Pong) -> None:
        if self._ping_sent_at is None or pong.id != self._ping_id:
            raise RemoteProtocolError(f"the peer sent PONG {pong.id}, which answers no PING")
        self.best_round_trip_seconds = min(self.best_round_trip_seconds, trio.current_time() - self._ping_sent_at)
        self._ping_sent_at = None

    async def _write(self) -> None:
        while True:
            await self._something_unsent.wait()
            while self._unsent:
                await self._transport.send_all(self._unsent[0])
                self._unsent.popleft()
                if self._unsent:
                    self._unsent_bytes -= len(self._unsent[0]) + _UNSENT_FRAME_BYTES
            self._something_unsent = trio.Event()

    async def _watch(self) -> None:
        """Ping after an interval's silence, and each interval while something is asked for. Nothing behind it for the
        timeout: dead. So is a connection that hardly brings anything, and not the answer to the ping. And at once, if
        nobody knows how long its round trip is."""
        link = self._link
        if self.best_round_trip_seconds == math.inf:
            self._ping()
        while True:
            await trio.sleep_until(self._last_received + link.ping_interval_seconds)
            self._check_pace()
            if self._was_heard():
                if self._connection.open_requests:
                    self._ping()
                continue
            asked_at = trio.current_time()
            self._ping()
            await trio.sleep_until(asked_at + link.ping_timeout_seconds)
            if not self._was_heard() and self._last_received < asked_at:
                raise ServerUnreachableError(
                    f"the server was silent for {trio.current_time() - self._last_received:.1f} s"
                )

    def _ping(self) -> None:
        """Unless one is under way: its answer says as much."""
        if self._ping_sent_at is None:
            self._ping_id += 1
            self._ping_sent_at = trio.current_time()
            self._received_before_ping = self._received_bytes
            self.send(Ping(self._ping_id))

    def _check_pace(self) -> None:
        if self._ping_sent_at is None:
            return
        waited = trio.current_time() - self._ping_sent_at
        came_bytes = self._received_bytes - self._received_before_ping
        if waited > self._link.trickle_seconds and came_bytes < waited * self._link.trickle_bytes_per_second:
            raise ServerUnreachableError(f"the server only trickles: {came_bytes} bytes in {waited:.1f} s")

    def _was_heard(self) -> bool:
        """Whether anything came since this was last asked; that then counts as received now."""
        if not self._heard:
            self.receive_nowait()  # too little of a large frame to be called for
        if not self._heard:
            return False
        self._heard = False
        self._last_received = trio.current_time()
        return True


async def open_session(
    transport: Transport,
    name: str,
    link: LinkSettings,
    counters: LinkCounters,
    maybe_greeted: ClientConnection | None = None,
) -> Session:
    """Say hello and wait for the welcome. The transport is closed on every failure, also on cancellation.
    `maybe_greeted`: a connection that has said it over this transport.

    Raises:
        ServerUnreachableError: cut, or silent for `link.handshake_timeout_seconds`.
        ServerRefusedError: the server said no.
        RemoteProtocolError: it speaks nonsense.
    """
    connection = maybe_greeted or ClientConnection()
    try:
        with trio.fail_after(link.handshake_timeout_seconds):
            asked_at = trio.current_time()
            if maybe_greeted is None:
                hello = connection.send(Hello(name))
                await transport.send_all(hello)
                counters.wire_sent_bytes += len(hello)
            welcome = await _welcome(transport, connection, counters)
    except trio.TooSlowError as error:
        transport.close()
        raise ServerUnreachableError(
            f"connected, but no welcome within {link.handshake_timeout_seconds:g} s"
        ) from error
    except BaseException:
        transport.close()
        raise
    session = Session(transport, connection, welcome, link, counters)
    if maybe_greeted is None:
        session.best_round_trip_seconds = trio.current_time() - asked_at
    return session


async def _welcome(transport: Transport, connection: ClientConnection, counters: LinkCounters) -> Welcome:
    while True:
        event = connection.next_event()
        if event is NEED_DATA:
            data = await transport.receive()
            counters.wire_received_bytes += len(data)
            connection.receive_data(data)
        elif event is CONNECTION_CLOSED:
            raise ServerUnreachableError("the server closed the connection before its welcome")
        elif isinstance(event, Welcome):
            return event
        elif isinstance(event, Error):
            raise refusal(event)
        elif isinstance(event, Goodbye):
            raise ServerUnreachableError(f"the server said goodbye: {event.reason}")
        else:
            raise RemoteProtocolError(f"the peer sent {type(event).__name__} before its welcome")
