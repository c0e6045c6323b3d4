"""Received bytes, cut into frames. Linear whatever the sizes of the pieces; at most one copy of a large payload.

A frame that lies inside one piece is parsed in place. One that spans pieces is gathered in a buffer of its own, which
then belongs to whoever got the frame. Nothing is kept of a frame whose header is refused.
"""

from __future__ import annotations

from collections import deque

from lazymem.errors import LocalProtocolError, RemoteProtocolError
from lazymem.wire.codec import decode
from lazymem.wire.frame import HEADER, HEADER_BYTES, Role, header_problem
from lazymem.wire.limits import MAX_UNREAD_BYTES
from lazymem.wire.messages import Message


class ReceiveBuffer:
    """Bytes of one peer, who is `sender`."""

    def __init__(self, sender: Role) -> None:
        self._sender = sender
        self._pieces: deque[bytes] = deque()
        self._at = 0  # position in the first piece
        self._unread = 0  # bytes in all pieces, from _at on
        self._cut = bytearray()  # beginning of a frame that spans pieces

    def __len__(self) -> int:
        """Bytes received and not yet handed out."""
        return self._unread + len(self._cut)

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
        if not self._cut and self._pieces:
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
        cut = self._cut
        if not self._gather(HEADER_BYTES):
            return None
        length, number, flags, reserved, request_id = HEADER.unpack_from(cut)
        wrong = header_problem(self._sender, length, number, flags, reserved, request_id)
        if wrong is not None:
            raise RemoteProtocolError(f"the peer sent {wrong}")
        if not self._gather(HEADER_BYTES + length):
            return None
        self._cut = bytearray()
        return decode(number, flags, request_id, cut, HEADER_BYTES, HEADER_BYTES + length)

    def _gather(self, goal: int) -> bool:
        """Move bytes from the pieces until the cut frame has `goal`; whether it has."""
        cut = self._cut
        while len(cut) < goal and self._pieces:
            piece, at = self._pieces[0], self._at
            taken = min(goal - len(cut), len(piece) - at)
            cut += memoryview(piece)[at : at + taken]
            self._advance(taken)
        return len(cut) >= goal

    def _advance(self, count: int) -> None:
        self._unread -= count
        self._at += count
        if self._at == len(self._pieces[0]):
            self._pieces.popleft()
            self._at = 0
