"""One connection, seen from one end: bytes in, messages out, and the other way round. No sockets, no clocks.

    connection = ClientConnection()
    sock.send(connection.send(Hello("name")))
    connection.receive_data(sock.recv(65536))          # b"" for the end of the stream
    while (event := connection.next_event()) is not NEED_DATA:
        ...

`send` raises `LocalProtocolError` when *we* would break the protocol; `next_event` raises `RemoteProtocolError` when
the peer did. Nothing else comes out. After a `RemoteProtocolError` the connection is dead: a server may still `send` an
`Error` with id 0, and both close the socket.

A stream that ends in the middle of a frame is no breach (a killed peer leaves that behind): `CONNECTION_CLOSED` comes,
and `cut_off` is True.
"""

from __future__ import annotations

import enum
from typing import Final, Literal

from lazymem.errors import LocalProtocolError, RemoteProtocolError
from lazymem.pages import PageRange
from lazymem.wire.codec import FRAME_TYPES, encode, encode_parts, lone_fetch, lone_pages, lone_range
from lazymem.wire.frame import Role
from lazymem.wire.limits import MAX_PINGS
from lazymem.wire.messages import (
    WIRE_VERSION,
    Cancel,
    Cancelled,
    Capability,
    Digests,
    Error,
    Fetch,
    FetchDigests,
    FileData,
    FileStored,
    Goodbye,
    Hello,
    Message,
    Packed,
    Pages,
    Ping,
    Pong,
    ReadFile,
    StoreFile,
    Welcome,
)
from lazymem.wire.receivebuffer import ReceiveBuffer
from lazymem.wire.requests import OpenRequests
from lazymem.wire.states import ConnectionStates, Move, State


class Signal(enum.Enum):
    NEED_DATA = "need data"
    CONNECTION_CLOSED = "connection closed"


NEED_DATA: Final = Signal.NEED_DATA
"""All that was received is handed out: call `receive_data`."""

CONNECTION_CLOSED: Final = Signal.CONNECTION_CLOSED
"""The peer ended its stream. Comes again however often it is asked for."""

Event = Message | Literal[Signal.NEED_DATA, Signal.CONNECTION_CLOSED]

_ANSWERS = (Pages, Packed, Digests, FileData, FileStored, Cancelled, Error)
_REQUESTS = (Fetch, FetchDigests, ReadFile, StoreFile)


def negotiate(hello: Hello) -> int | None:
    """The newest wire version that both sides speak; None if there is none."""
    return WIRE_VERSION if hello.version_min <= WIRE_VERSION <= hello.version_max else None


class Connection:
    """What both ends share; use `ClientConnection` or `ServerConnection`."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._peer = role.peer
        self._states = ConnectionStates()
        self._buffer = ReceiveBuffer(self._peer)
        self._ended = False
        self._broken: str | None = None
        self._hello: Hello | None = None
        self._welcome: Welcome | None = None
        self._requests: OpenRequests | None = None
        self._pings = {Role.CLIENT: 0, Role.SERVER: 0}

    @property
    def our_state(self) -> State:
        return self._states[self._role]

    @property
    def their_state(self) -> State:
        return self._states[self._peer]

    @property
    def _both_open(self) -> bool:
        """Both sides are in the middle of their talk."""
        return self._states.both_open and not self._ended and self._broken is None

    @property
    def welcome(self) -> Welcome | None:
        """What the server said first, once it was sent or received."""
        return self._welcome

    @property
    def open_requests(self) -> int:
        return 0 if self._requests is None else len(self._requests)

    def is_open(self, request_id: int) -> bool:
        """Whether the request still misses its last answer."""
        return self._requests is not None and request_id in self._requests

    @property
    def cut_off(self) -> bool:
        """The stream ended in the middle of a frame."""
        return self._ended and len(self._buffer) > 0

    def send(self, message: Message) -> bytes:
        """The bytes to put on the stream, in the order of the calls.

        Raises:
            LocalProtocolError: not allowed now, or not allowed at all. The connection is as before the call.
        """
        frame = encode(message)
        wrong = self._note(message, self._role)
        if wrong is not None:
            raise LocalProtocolError(f"refused to send {wrong}")
        return frame

    def send_parts(self, message: Message) -> tuple[bytes | memoryview, ...]:
        """As `send`, in pieces to put on the stream one after the other: large page data is not copied."""
        parts = encode_parts(message)
        wrong = self._note(message, self._role)
        if wrong is not None:
            raise LocalProtocolError(f"refused to send {wrong}")
        return parts

    def receive_data(self, data: bytes) -> None:
        """Take what the socket gave; ``b""`` says that the peer's stream ended.

        Raises:
            LocalProtocolError: data after the end, or megabytes without a `next_event` in between.
        """
        if not data:
            self._ended = True
        elif self._ended:
            raise LocalProtocolError("received data after the end of the stream")
        self._buffer.feed(data)

    def maybe_room(self) -> memoryview | None:
        """Where the peer's next bytes belong, if they are the rest of a large frame: a socket may put them there. Then
        `filled`, at once, in place of `receive_data`."""
        return self._buffer.maybe_room()

    @property
    def missing(self) -> int:
        """So many bytes must still come before there is another event; at least one."""
        return self._buffer.missing

    def filled(self, count: int) -> None:
        """So many bytes, not none, came into `maybe_room`."""
        self._buffer.filled(count)

    def next_event(self) -> Event:
        """The next message, or `NEED_DATA`, or `CONNECTION_CLOSED`.

        Raises:
            RemoteProtocolError: the peer broke the protocol, now or earlier.
        """
        if self._broken is not None:
            raise RemoteProtocolError(self._broken)
        try:
            message = self._buffer.next_message()
            if message is None:
                return self._no_message()
            wrong = self._note(message, self._peer)
            if wrong is not None:
                raise RemoteProtocolError(f"the peer sent {wrong}")
        except RemoteProtocolError as error:
            self._broken = str(error)
            self._states.close(self._peer)
            raise
        return message

    def _no_message(self) -> Event:
        if not self._ended:
            return NEED_DATA
        self._states.close(self._peer)
        return CONNECTION_CLOSED

    def _note(self, message: Message, sender: Role) -> str | None:
        """Check a message of either side against all we know; note it, or return what is wrong and note nothing."""
        kind = type(message)
        move = Move.FATAL_ERROR if kind is Error and message.id == 0 else FRAME_TYPES[kind]  # type: ignore[union-attr]
        wrong = self._states.problem(sender, move) or self._content_problem(message, sender)
        if wrong is None:
            self._states.advance(sender, move)
        return wrong

    def _content_problem(self, message: Message, sender: Role) -> str | None:
        if isinstance(message, _ANSWERS):
            # Only a fatal error may come before the WELCOME or be about no request.
            return self._requests.note_answer(message) if self._requests is not None and message.id else None
        if isinstance(message, _REQUESTS):
            assert self._requests is not None, "the state table lets no request through before a WELCOME"
            return self._requests.note_request(message)
        if isinstance(message, Hello):
            self._hello = message
            return None
        if isinstance(message, Welcome):
            return self._welcome_problem(message)
        if isinstance(message, Cancel):
            return self._cancel_problem(message, sender)
        return None if isinstance(message, Goodbye) else self._ping_problem(message, sender)

    def _cancel_problem(self, cancel: Cancel, sender: Role) -> str | None:
        assert self._requests is not None, "the state table lets no CANCEL through before a WELCOME"
        if self._role is sender:
            return self._requests.note_cancel_sent(cancel)
        self._requests.note_cancel_received(cancel)
        return None

    def _welcome_problem(self, welcome: Welcome) -> str | None:
        hello = self._hello
        assert hello is not None, "the state table lets no WELCOME through before a HELLO"
        if not hello.version_min <= welcome.version <= hello.version_max:
            return f"WELCOME with version {welcome.version}, offered were {hello.version_min} to {hello.version_max}"
        if welcome.capabilities & ~hello.capabilities:
            return "WELCOME with a capability that was not offered"
        if hello.name and welcome.name != hello.name:
            return f"WELCOME to {welcome.name!r} when {hello.name!r} was asked for"
        self._welcome = welcome
        self._requests = OpenRequests(welcome)
        return None

    def _ping_problem(self, message: Ping | Pong, sender: Role) -> str | None:
        asker = sender if isinstance(message, Ping) else sender.peer
        if isinstance(message, Ping):
            if self._pings[asker] >= MAX_PINGS:
                return f"more than {MAX_PINGS} unanswered PINGs"
            self._pings[asker] += 1
        else:
            if not self._pings[asker]:
                return "PONG without a PING"
            self._pings[asker] -= 1
        return None


class ClientConnection(Connection):
    """The mount's end."""

    def __init__(self) -> None:
        super().__init__(Role.CLIENT)

    def send_lone(self, fetch: Fetch) -> bytes | None:
        """As `send`, for a FETCH of one range, if it is legal now; None: nothing was noted, `send` says why."""
        requests = self._requests
        if requests is None or not self._both_open:
            return None
        pages = fetch.ranges[0]
        start, count = pages.start, pages.count
        if not fetch.id or not requests.may_open(fetch.id, start, count):
            return None
        requests.open_lone(fetch)
        return lone_fetch(fetch.id, start, count, fetch.flags)

    def maybe_ask(self, request_id: int, pages: PageRange) -> bytes | None:
        """The frame of a FETCH that is legal now, of one range, without flags; None: it is not. Nothing is noted: only
        for who calls `enter_asked` before anything else, or takes in its whole answer outside of the connection."""
        requests = self._requests
        if requests is None or self._buffer or not self._both_open:
            return None
        start, count = pages.start, pages.count
        return lone_fetch(request_id, start, count, 0) if requests.may_open(request_id, start, count) else None

    def enter_asked(self, fetch: Fetch) -> None:
        """What `maybe_ask` gave was sent: note it."""
        assert self._requests is not None, "it was legal"
        self._requests.open_lone(fetch)

    def lone_answer(self, data: bytes) -> tuple[int, int, int, bytes | None] | None:
        """Id, first page, count and bytes (None: zeros) if `data` is the whole answer of an open FETCH of one range, in
        one uncompressed frame, and all that was received. It is then noted. Otherwise nothing is, and `data` takes the
        common way (`receive_data`)."""
        requests = self._requests
        if requests is None or self._buffer or not self._both_open:
            return None
        found = lone_pages(data)
        if found is None or not requests.take_lone(found[0], found[1], found[2], found[3] is None):
            return None
        return found


class ServerConnection(Connection):
    """The server's end."""

    def __init__(self) -> None:
        super().__init__(Role.SERVER)

    def capabilities(
        self, offered: Capability, *, learns: bool = False, vouches: bool = False, sums: bool = False
    ) -> Capability:
        """Those of a HELLO's capabilities that this side has too. `learns`: it takes a working set of the snapshot;
        `vouches`: it tells digests of an unhashed one; `sums`: it has the leaves' sums of this one."""
        ours = Capability.ZSTD | Capability.PACKED
        ours |= Capability.LEARN if learns else 0
        ours |= Capability.VOUCH if vouches else 0
        ours |= Capability.SUMS if sums else 0
        return offered & ours

    def lone_fetch(self, data: bytes) -> tuple[int, int, int, int] | None:
        """Id, flags, first page and count, if `data` is a FETCH of one range, all that was received, and legal now.

        Nothing is noted: for a server that answers it whole before it does anything else. Otherwise, or with None,
        `data` takes the common way (`receive_data`), which says what is wrong with it.
        """
        requests = self._requests
        if requests is None or self._buffer or not self._both_open:
            return None
        found = lone_range(data)
        return found if found is not None and requests.may_open(found[0], found[2], found[3]) else None
