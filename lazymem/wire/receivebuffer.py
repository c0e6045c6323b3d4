"""Received bytes, cut into frames. Linear whatever the sizes of the pieces; at most one copy of a large payload.

A frame that lies inside one piece is parsed in place. One that spans pieces is gathered in a buffer of its own, which
then belongs to whoever got the frame. Nothing is kept of a frame whose header is refused. What is missing of a large
frame the socket may put there itself (`maybe_room`), which saves the copy.
"""

from __future__ import annotations

from collections import deque

from lazymem.errors import LocalProtocolError, RemoteProtocolError
from lazymem.wire.codec import decode
from lazymem.wire.frame import HEADER, HEADER_BYTES, Role, header_problem
from lazymem.wire.limits import MAX_UNREAD_BYTES
from lazymem.wire.messages import Message

MIN_ROOM_BYTES = 16 * 1024
"""Of less a copy is cheaper than the second system call that it saves."""


class ReceiveBuffer:
    """Bytes of one peer, who is `sender`."""

    def __init__(self, sender: Role) -> None:
        self._sender = sender
        self._pieces: deque[bytes] = deque()
        self._at = 0  # position in the first piece
        self._unread = 0  # bytes in all pieces, from _at on
        self._cut = bytearray()  # a frame that spans pieces: its header, and once that is known room for all of it
        self._have = 0  # bytes of `_cut` that are here

    def __len__(self) -> int:
        """Bytes received and not yet handed out."""
        return self._unread + self._have

    @property
    def missing(self) -> int:
        """Bytes that must still come before there is another message; at least one."""
        return max(1, len(self._cut) - self._have)

    def maybe_room(self) -> memoryview | None:
        """Where the next bytes of the stream belong, if many are missing of a frame that began. Whoever puts some there
        says so (`filled`) before anything else is fed or asked for."""
        if self.missing < MIN_ROOM_BYTES or self._pieces:
            return None
        return memoryview(self._cut)[self._have :]

    def filled(self, count: int) -> None:
        """So many bytes are in `maybe_room`, from its beginning."""
        self._have += count

    def feed(self, data: bytes) -> None:
        """Add what the socket gave.

        Raises:
            LocalProtocolError: the caller fed megabytes without asking for messages in between.
        """
        if not data:
            return
        if self._unread > MAX_UNREAD_BYTES:
            raise LocalProtocolError(f"more than {MAX_UNREAD_BYTES} bytes fed without asking for messages")
        self._pieces.append(data)
        self._unread += len(data)

    def next_message(self) -> Message | None:
        """The next whole frame's message; None if more bytes are needed.

        Raises:
            RemoteProtocolError: not a frame of `sender`, found as early as its header shows it.
        """
        if not self._have and self._pieces:
            message = self._parse_in_place(self._pieces[0])
            if message is not None:
                return message
        return self._parse_gathered()

    def _parse_in_place(self, piece: bytes) -> Message | None:
        at = self._at
        if len(piece) - at < HEADER_BYTES:
            return None
        length, number, flags, reserved, request_id = HEADER.unpack_from(piece, at)
        wrong = header_problem(self._sender, length, number, flags, reserved, request_id)
        if wrong is not None:
            raise RemoteProtocolError(f"the peer sent {wrong}")
        start = at + HEADER_BYTES
        if len(piece) - start < length:
            return None
        self._advance(HEADER_BYTES + length)
        return decode(number, flags, request_id, piece, start, start + length)

    def _parse_gathered(self) -> Message | None:
        if not self._gather(HEADER_BYTES):
            return None
        length, number, flags, reserved, request_id = HEADER.unpack_from(self._cut)
        wrong = header_problem(self._sender, length, number, flags, reserved, request_id)
        if wrong is not None:
            raise RemoteProtocolError(f"the peer sent {wrong}")
        if not self._gather(HEADER_BYTES + length):
            return None
        cut, self._cut, self._have = self._cut, bytearray(), 0
        return decode(number, flags, request_id, cut, HEADER_BYTES, HEADER_BYTES + length)

    def _gather(self, goal: int) -> bool:
        """Move bytes from the pieces until `goal` of the cut frame are here; whether they are."""
        if len(self._cut) < goal and (self._have or self._pieces):
            self._cut = self._cut.ljust(goal, b"\0")  # not `extend`: a view of it may be out there
        while self._have < goal and self._pieces:
            piece, at, have = self._pieces[0], self._at, self._have
            taken = min(goal - have, len(piece) - at)
            self._cut[have : have + taken] = memoryview(piece)[at : at + taken]
            self._have += taken
            self._advance(taken)
        return self._have >= goal

    def _advance(self, count: int) -> None:
        self._unread -= count
        self._at += count
        if self._at == len(self._pieces[0]):
            self._pieces.popleft()
            self._at = 0
