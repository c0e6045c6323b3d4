"""The short way of a guest's fault: a demand of a few pages that nothing is before, answered between two system calls.

For the session's thread alone. Whatever is not plainly such a demand, or would have to wait for a disk, is left to the
common way (`session`, `jobs`), and nothing has happened.
"""

from __future__ import annotations

from lazymem.digests import LEAF_PAGES
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.reader import SnapshotReader
from lazymem.wire.codec import encode, raw_head, zero_frame
from lazymem.wire.connection import ServerConnection
from lazymem.wire.messages import Digests, FetchFlag, Level
from lazymem_server.counters import Counters
from lazymem_server.outlet import Outlet
from lazymem_server.output import Lane
from lazymem_server.pace import Pace

_WANT_DIGESTS = int(FetchFlag.WANT_DIGESTS)
_BACKGROUND = int(FetchFlag.BACKGROUND)

REMEMBERED_DEMANDS = 1024
"""Whoever demands again what it had so few demands ago did not like what it got."""


class RecentDemands:
    """First pages of the last demands."""

    def __init__(self) -> None:
        self._pages: dict[int, None] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def note(self, page: int) -> None:
        pages = self._pages
        pages[page] = None
        if len(pages) > REMEMBERED_DEMANDS:
            del pages[next(iter(pages))]


class ShortWay:
    """One session's. `demands`: noted here, as in the common way. `most_pages`: of more, a demand goes that way."""

    def __init__(
        self,
        connection: ServerConnection,
        outlet: Outlet,
        counters: Counters,
        pace: Pace,
        demands: RecentDemands,
        most_pages: int,
    ) -> None:
        self._connection = connection
        self._outlet = outlet
        self._counters = counters
        self._pace = pace
        self._demands = demands
        self._most_pages = most_pages
        self._buffer = memoryview(bytearray(most_pages * PAGE_SIZE))
        self._one_page = self._buffer[:PAGE_SIZE]

    def answer(self, data: bytes, reader: SnapshotReader) -> bool:
        """Answer what was received, `data`, if it is one demand whose pages the host has in memory; whether it was.

        Nothing may be open or unsent before it.
        """
        lone = self._connection.lone_fetch(data)
        if lone is None:
            return False
        request_id, flags, start, count = lone
        if count > self._most_pages or start % LEAF_PAGES + count > LEAF_PAGES:
            return False
        if flags & _BACKGROUND or start in self._demands or self._pace.slow or count > self._pace.frame_pages:
            return False
        buffer = self._one_page if count == 1 else self._buffer[: count * PAGE_SIZE]
        held = reader.read_into_nowait(start, count, buffer)
        if held is None:
            return False
        frame = (raw_head(request_id, start, count), buffer) if held else (zero_frame(request_id, start, count),)
        if flags & _WANT_DIGESTS:
            leaf = start // LEAF_PAGES
            frame = (encode(Digests(request_id, Level.LEAF, leaf, reader.leaf(leaf))), *frame)
        self._demands.note(start)
        self._counters.requests += 1
        self._counters.answered += 1
        sent = self._outlet.write(frame)
        if sent < sum(map(len, frame)):
            rest = b"".join(frame)[sent:]  # a copy: the buffer is the next answer's
            self._outlet.put((rest,), Lane.CONTROL if sent else Lane.DEMAND)
        return True
