"""Links that note what a client asks its server for, and on which answers can be held back."""

from __future__ import annotations

import socket
import time

from lazymem.pages import PageRange
from lazymem.wire import frame
from lazymem.wire.codec import decode
from lazymem.wire.messages import Fetch, FetchFlag
from tests.support.badlink import LOOK_SECONDS, BadLink, _Connection


class HeldAnswers(BadLink):
    """While `holding`, the server hears its clients and they do not hear it."""

    def __init__(self, target: str) -> None:
        self.holding = False
        self._said: dict[_Connection, bytes] = {}
        super().__init__(target)

    def asked(self) -> list[PageRange]:
        """What was fetched over each connection, in order."""
        return [pages for said in list(self._said.values()) for fetch in _fetches_in(said) for pages in fetch.ranges]

    def _holds(self, connection: _Connection) -> bool:
        return self.holding

    def _pass_on(self, connection: _Connection, data: bytes, to: socket.socket) -> None:
        if to is connection.server:
            self._said[connection] = self._said.get(connection, b"") + data
        while to is connection.client and self._holds(connection) and not self._closing:
            time.sleep(LOOK_SECONDS)
        super()._pass_on(connection, data, to)


class HeldGuesses(HeldAnswers):
    """While `holding`, as it is from the beginning, a client that guesses hears nothing where it does."""

    def __init__(self, target: str) -> None:
        self._guessers: list[_Connection] = []
        super().__init__(target)
        self.holding = True

    def guessed(self) -> list[list[PageRange]]:
        """What was asked for over each connection on which somebody guesses; whose first guess was earlier is first."""
        said = [self._said[connection] for connection in list(self._guessers)]
        return [[pages for fetch in _fetches_in(one) if _is_guess(fetch) for pages in fetch.ranges] for one in said]

    def _holds(self, connection: _Connection) -> bool:
        return self.holding and connection in self._guessers

    def _pass_on(self, connection: _Connection, data: bytes, to: socket.socket) -> None:
        said = self._said.get(connection, b"") + data
        if to is connection.server and connection not in self._guessers and any(map(_is_guess, _fetches_in(said))):
            self._said.setdefault(connection, b"")
            self._guessers.append(connection)
        super()._pass_on(connection, data, to)


def _is_guess(fetch: Fetch) -> bool:
    return bool(fetch.flags & FetchFlag.BACKGROUND)


def _fetches_in(said: bytes) -> list[Fetch]:
    found: list[Fetch] = []
    at = 0
    while at + frame.HEADER.size <= len(said):
        length, number, flags, _, request_id = frame.HEADER.unpack_from(said, at)
        at += frame.HEADER.size
        if at + length > len(said):
            break
        message = decode(number, flags, request_id, said, at, at + length)
        if isinstance(message, Fetch):
            found.append(message)
        at += length
    return found
