"""One lane to the server: a connection that comes back by itself, and the requests that outlive it.

Shared state: `_requests` holds every request that was submitted and not ended; a part of one is either in `_unsent` or,
by its id, in `_open` of the present session. Every change happens without an await in between, so the reader task, the
submitting tasks and a reconnect never see half of one.

Where cancellation leaves things: a cancelled request is out of `_requests` at once; its open ids stay in `_open` as
None until the server's last word on them, and what still comes for them is dropped.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from lazymem.errors import LazymemError, LocalProtocolError
from lazymem.fetch.backoff import Backoff
from lazymem.fetch.requests import FetchRequest, Part, Request, maybe_again, refusal
from lazymem.fetch.session import Session
from lazymem.pages import PageRange
from lazymem.settings import ServerAddress
from lazymem.wire.messages import Cancel, Cancelled, Error, Message

logger = logging.getLogger(__name__)

Connect = Callable[[ServerAddress | None], Awaitable[tuple[Session, ServerAddress]]]
"""Dial, shake hands, check the identity; gets whom the last connection was with, and raises LazymemError."""

Turn = Callable[[], Awaitable[None]]

MAX_REQUESTS = 4096
"""Requests of one lane at a time. The scheduler stays far below; whoever exceeds it has a leak."""

STABLE_SECONDS = 10.0
"""A connection that lived so long had no part in the failures before it: the next wait is a first one again."""


class Lane:
    """`run` keeps the connection; `submit` and `cancel` are called from any task and never wait."""

    def __init__(
        self,
        name: str,
        connect: Connect,
        backoff: Backoff,
        maybe_open: tuple[Session, ServerAddress] | None = None,
        on_lost: Callable[[], None] = lambda: None,
        wait_turn: Turn = trio.lowlevel.checkpoint,
    ) -> None:
        """`maybe_open` is a session to start with; `on_lost` is called after each end of a connection; `wait_turn` is
        awaited before each try of another one."""
        self.name = name
        self._on_lost = on_lost
        self._wait_turn = wait_turn
        self.reconnects = 0
        self._connect = connect
        self._backoff = backoff
        self.maybe_server: ServerAddress | None = None
        """Whom the connection is with, or was with last."""
        self._maybe_first = maybe_open
        self._session: Session | None = None
        self._requests: dict[Request, None] = {}
        self._unsent: deque[tuple[Request, Part]] = deque()
        self._open: dict[int, tuple[Request, Part] | None] = {}
        self._next_id = 1
        self._wanted = trio.Event()
        self._is_up, self._is_down = trio.Event(), trio.Event()
        self._nursery: trio.Nursery | None = None
        self._lost_since: float | None = None
        self._last_error: LazymemError | None = None
        self._refusing = False
        self._best_round_trip = math.inf
        if maybe_open is not None:
            self._wanted.set()
            self._attach(*maybe_open)

    @property
    def connected(self) -> bool:
        return self._session is not None

    @property
    def is_on_this_host(self) -> bool:
        """As the session's; False without one."""
        return self._session is not None and self._session.is_on_this_host

    @property
    def open_requests(self) -> int:
        return len(self._requests)

    @property
    def best_round_trip_seconds(self) -> float:
        """Of all this lane's connections; infinite before the first."""
        maybe_session = self._session
        best = self._best_round_trip
        return best if maybe_session is None else min(best, maybe_session.best_round_trip_seconds)

    @property
    def state(self) -> str:
        """For people: connected to whom, idle, or since when and why not."""
        if self._session is not None:
            return f"{self.maybe_server}: connected"
        if self._lost_since is None:
            return "not connected yet"
        return f"trying to reconnect for {trio.current_time() - self._lost_since:.0f} s: {self._last_error}"

    async def wait_connected(self) -> None:
        """Returns at once where there is a connection."""
        await self._is_up.wait()

    async def wait_lost(self) -> None:
        """Until there is no connection: at once after an end that `run` has not mended yet."""
        await self._is_down.wait()

    def connect_soon(self) -> None:
        """Without waiting for the first request."""
        self._wanted.set()

    def submit(self, request: Request) -> None:
        """Send now if there is a connection with room, else as soon as there is."""
        assert len(self._requests) < MAX_REQUESTS
        self._requests[request] = None
        self._wanted.set()
        if self._session is not None:
            self._queue(request, self._session)
            self._pump(self._session)

    def submit_lone(self, request: FetchRequest) -> None:
        """As `submit`, for a fetch of one range; the way of a page fault."""
        session = self._session
        if session is None or self._unsent or len(self._requests) >= MAX_REQUESTS:
            self.submit(request)
            return
        request_id = self._next_id
        if not session.send_lone(request.lone_message(request_id)):
            self.submit(request)
            return
        self._next_id = request_id + 1
        self._requests[request] = None
        self._open[request_id] = (request, request.ranges)
        request.open_parts = 1

    # ---- one fetch that is answered before anything else happens, or entered

    def ask(self, pages: PageRange) -> bool:
        """Send a FETCH of `pages` and note nothing; False: nothing was sent."""
        session = self._session
        if session is None or self._unsent or not session.ask(self._next_id, pages):
            return False
        self._next_id += 1
        return True

    def maybe_asked_answer(self) -> memoryview | None:
        """The bytes of its pages, if just they came; `end_asked` or `enter_asked` must follow."""
        return None if self._session is None else self._session.maybe_asked_answer()

    def end_asked(self) -> None:
        """They were right."""
        assert self._session is not None
        self._session.end_asked()
        if self._refusing:
            self._refusing = False
            self._backoff.reset()

    def enter_asked(self, make: Callable[[PageRange], FetchRequest]) -> None:
        """It is a request like others from now on; `make` makes it."""
        session = self._session
        assert session is not None
        request_id, pages = session.asked
        request = make(pages)
        session.enter_asked(request.lone_message(request_id))
        self._requests[request] = None
        self._open[request_id] = (request, request.ranges)
        request.open_parts = 1

    def fileno(self) -> int:
        """The connection's socket; -1 without one."""
        return -1 if self._session is None else self._session.fileno()

    def receive_nowait(self) -> bool:
        """Take in what has come on the connection; False when that is nothing."""
        return self._session is not None and self._session.receive_nowait()

    @property
    def requests(self) -> list[Request]:
        """Everything submitted and not ended."""
        return list(self._requests)

    def cancel(self, request: Request) -> None:
        """Forget the request: its `end` is not called any more. Unknown or ended ones are ignored."""
        if request not in self._requests:
            return
        self._drop(request)
        if self._session is not None:
            self._pump(self._session)

    def take_unsent(self, request: Request) -> bool:
        """Whether the request is here and nothing of it is on a connection; if so it is forgotten here."""
        if request not in self._requests or any(entry and entry[0] is request for entry in self._open.values()):
            return False
        self._drop(request)
        return True

    async def run(self) -> None:
        """Connect when first needed, and again whenever the connection is lost, for ever."""
        await self._wanted.wait()
        while True:
            try:
                session, server = self._maybe_first or await self._connect_in_turn()
                self._maybe_first = None
                await self._serve(session, server)
            except LazymemError as error:
                self._note_loss(error)
            await trio.sleep(self._backoff.next_delay())

    async def _connect_in_turn(self) -> tuple[Session, ServerAddress]:
        await self._wait_turn()
        return await self._connect(self.maybe_server)

    def drop(self, error: LazymemError) -> None:
        """End the connection, if there is one, as if that had gone wrong with it: `run` makes the next."""
        if self._session is not None:
            self._session.fail(error)

    def close(self) -> None:
        """Drop the connection, also one that `run` never came to; requests stay unanswered."""
        self._detach()

    async def _serve(self, session: Session, server: ServerAddress) -> None:
        """Until the session is over, which raises. Its cause leaves the nursery by hand, so that it comes ungrouped."""
        cause: LazymemError | None = None
        started_at = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._session is None:
                    self._attach(session, server)
                try:
                    await session.run(self._on_message, self._on_lone)
                except LazymemError as error:
                    cause = error
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self._detach()
        if trio.current_time() - started_at > STABLE_SECONDS:
            self._backoff.reset()
        if cause is not None:
            raise cause

    # ---- the connection comes and goes

    def _attach(self, session: Session, server: ServerAddress) -> None:
        if self._lost_since is not None:
            self.reconnects += 1
            lasted = trio.current_time() - self._lost_since
            logger.warning("%s connection is back after %.1f s, with %s", self.name, lasted, server)
        self._lost_since = None
        self.maybe_server = server
        self._session = session
        self._is_down = trio.Event()
        self._is_up.set()
        for request in list(self._requests):
            self._queue(request, session)
        self._pump(session)

    def _detach(self) -> None:
        if self._session is not None:
            self._best_round_trip = self.best_round_trip_seconds
            self._session.close()
        self._session = None
        self._is_up = trio.Event()
        self._is_down.set()
        self._open.clear()
        self._unsent.clear()
        for request in self._requests:
            request.open_parts = 0
        self._on_lost()

    def _note_loss(self, error: LazymemError) -> None:
        """Log when it breaks and when the reason changes, not at every try."""
        if self._lost_since is None:
            self._lost_since = trio.current_time()
            what = "not made" if self.maybe_server is None else f"to {self.maybe_server} lost"
            logger.warning("%s connection %s, trying again until it is there: %s", self.name, what, error)
        elif str(error) != str(self._last_error):
            logger.warning("%s connection: still trying: %s", self.name, error)
        self._last_error = error

    # ---- requests

    def _queue(self, request: Request, session: Session) -> None:
        parts = request.parts(session.welcome.limits)
        request.open_parts = len(parts)
        if not parts:
            self._end(request, None)
            return
        for part in parts:
            self._unsent.append((request, part))

    def _pump(self, session: Session) -> None:
        """Send what the server takes now."""
        while self._unsent and session.may_request():
            request, part = self._unsent.popleft()
            request_id = self._next_id
            self._next_id += 1
            self._open[request_id] = (request, part)
            try:
                session.send(request.message(request_id, part, session.welcome))
            except LocalProtocolError as error:
                del self._open[request_id]
                self._end(request, error)

    def _on_message(self, message: Message) -> None:
        request_id: int = message.id  # type: ignore[union-attr]  # the connection lets only answers through
        entry = self._open[request_id]
        kind = type(message)
        if kind is Error or kind is Cancelled:
            del self._open[request_id]
            if kind is Error and entry is not None:
                self._refused(entry[0], message)  # type: ignore[arg-type]
        elif entry is None:
            if getattr(message, "final", True):
                del self._open[request_id]
        elif entry[0].take(message):
            del self._open[request_id]
            self._backoff.reset()
            self._refusing = False
            request = entry[0]
            request.open_parts -= 1
            if not request.open_parts:
                self._end(request, None)
        if self._unsent and self._session is not None:
            self._pump(self._session)

    def _on_lone(self, request_id: int, start: int, count: int, maybe_data: bytes | None) -> None:
        entry = self._open.pop(request_id)
        assert entry is not None, "of a cancelled request the connection gives the common way"
        request = entry[0]
        assert isinstance(request, FetchRequest)
        if self._refusing:
            self._refusing = False
            self._backoff.reset()
        request.open_parts -= 1
        if request.maybe_on_here is not None and count == request.ranges[0].count:
            del self._requests[request]
            request.maybe_on_here(maybe_data)
        else:
            request.take_lone(start, count, maybe_data)
            if not request.open_parts:
                self._end(request, None)
        if self._unsent and self._session is not None:
            self._pump(self._session)

    def _refused(self, request: Request, error: Error) -> None:
        if not maybe_again(error):
            self._end(request, refusal(error))
            return
        if not self._refusing:
            logger.warning("%s connection: a request is refused for now and tried again: %s", self.name, error.text)
        self._refusing = True
        self._drop(request)
        self._requests[request] = None
        request.open_parts = 0
        if self._nursery is not None and self._session is not None:
            self._nursery.start_soon(self._resend_later, request, self._session)

    async def _resend_later(self, request: Request, session: Session) -> None:
        """Lives in the session's nursery: after a reconnect everything is sent again anyway."""
        await trio.sleep(self._backoff.next_delay())
        if request in self._requests and not request.open_parts:
            self._queue(request, session)
            self._pump(session)

    def _end(self, request: Request, maybe_error: LazymemError | None) -> None:
        if request in self._requests:
            if maybe_error is None:
                del self._requests[request]
            else:
                self._drop(request)
            request.end(maybe_error)

    def _drop(self, request: Request) -> None:
        """Out of every list; what is open of it is cancelled at the server."""
        del self._requests[request]
        if len(self._unsent):
            self._unsent = deque(entry for entry in self._unsent if entry[0] is not request)
        if not request.open_parts:
            return
        for request_id, entry in list(self._open.items()):
            if entry is not None and entry[0] is request:
                self._open[request_id] = None
                if self._session is not None:
                    self._session.send(Cancel(request_id))
