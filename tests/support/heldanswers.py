"""A link that notes what a client asks its server for, and on which answers can be held back."""

from __future__ import annotations

import socket
import time

from lazymem.pages import PageRange
from lazymem.wire import frame
from lazymem.wire.codec import decode
from lazymem.wire.messages import Fetch
from tests.support.badlink import LOOK_SECONDS, BadLink, _Connection


class HeldAnswers(BadLink):
    """While `holding`, the server hears its clients and they do not hear it."""

    def __init__(self, target: str) -> None:
        self.holding = False
        self._said: dict[_Connection, bytes] = {}
        super().__init__(target)

    def asked(self) -> list[PageRange]:
        """What was fetched over each connection, in order."""
        return [pages for said in list(self._said.values()) for pages in _fetched(said)]

    def _pass_on(self, connection: _Connection, data: bytes, to: socket.socket) -> None:
        if to is connection.server:
            self._said[connection] = self._said.get(connection, b"") + data
        while to is connection.client and self.holding and not self._closing:
            time.sleep(LOOK_SECONDS)
        super()._pass_on(connection, data, to)


def _fetched(said: bytes) -> list[PageRange]:
    found: list[PageRange] = []
    at = 0
    while at + frame.HEADER.size <= len(said):
        length, number, flags, _, request_id = frame.HEADER.unpack_from(said, at)
        at += frame.HEADER.size
        if at + length > len(said):
            break
        message = decode(number, flags, request_id, said, at, at + length)
        if isinstance(message, Fetch):
            found += message.ranges
        at += length
    return found
