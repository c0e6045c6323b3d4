"""A link that counts which guesses come between a demand and its answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

from lazymem.wire.frame import FINAL, HEADER, FrameType
from lazymem.wire.messages import FetchFlag
from tests.support.badlink import BadLink, _Connection


class CountingLink(BadLink):
    """Of all connections together, since they share what lies behind it. To be put at the near end of a slow one: what
    passes here after a demand was before the demand's answer on the way, wherever it waited."""

    def __init__(self, target: str) -> None:
        self._lock = threading.Lock()
        self._asked: dict[_Connection, _Frames] = {}
        self._answered: dict[_Connection, _Frames] = {}
        self._guesses: set[tuple[_Connection, int]] = set()
        self._demands: dict[tuple[_Connection, int], int] = {}
        self._guessed_bytes = 0
        self.before_answers: list[int] = []
        """Bytes of guesses that came between each demand and its answer, in the order of the answers."""
        super().__init__(target)

    def _pass_on(self, connection: _Connection, data: bytes, to: socket.socket) -> None:
        with self._lock:
            if to is connection.server:
                self._note_asked(connection, data)
            else:
                self._note_answered(connection, data)
        super()._pass_on(connection, data, to)

    def _note_asked(self, connection: _Connection, data: bytes) -> None:
        for number, flags, request_id, _, is_end in self._asked.setdefault(connection, _Frames()).parts(data):
            if number != FrameType.FETCH or not is_end:
                continue
            if flags & FetchFlag.BACKGROUND:
                self._guesses.add((connection, request_id))
            else:
                self._demands[connection, request_id] = self._guessed_bytes

    def _note_answered(self, connection: _Connection, data: bytes) -> None:
        for number, flags, request_id, count, is_end in self._answered.setdefault(connection, _Frames()).parts(data):
            if (connection, request_id) in self._guesses:
                self._guessed_bytes += count
            elif number in (FrameType.PAGES, FrameType.PACKED) and flags & FINAL and is_end:
                self.before_answers.append(self._guessed_bytes - self._demands.pop((connection, request_id)))


class _Frames:
    """One direction of one connection, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._now = (0, 0, 0)

    def parts(self, data: bytes) -> Iterator[tuple[int, int, int, int, bool]]:
        """Type, flags and id of the frame that each part of `data` is of; its bytes; and whether the frame ends there.
        A header counts with what follows it."""
        at = 0
        while at < len(data):
            taken = 0
            if not self._left:
                taken = min(HEADER.size - len(self._head), len(data) - at)
                self._head += data[at : at + taken]
                at += taken
                if len(self._head) < HEADER.size:
                    return
                self._left, number, flags, _, request_id = HEADER.unpack(self._head)
                self._now = (number, flags, request_id)
                self._head = b""
            more = min(self._left, len(data) - at)
            self._left -= more
            at += more
            yield *self._now, taken + more, not self._left
