"""Connections that shake hands: each for so long, so many at a time, and a crowd costs the crowded host its oldest.

An honest handshake takes a few round trips. So whoever is silent loses its place to whoever comes, and one host that
takes many places loses its own: strangers in any number keep no other client out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Handshake:
    """One that is going on. `evicted`: it lost its place."""

    def __init__(self, host: str, scope: trio.CancelScope) -> None:
        self.host = host
        self.scope = scope
        self.evicted = False


class Handshakes:
    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._open: dict[Handshake, None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def begun(self, host: str) -> Iterator[Handshake]:
        """For the handshake of a client at `host`; the block ends early when its time or its place is lost, and
        `scope.cancelled_caught` then says so."""
        if len(self._open) >= self._most:
            self._evict()
        handshake = Handshake(host, trio.CancelScope(deadline=trio.current_time() + self._seconds))
        self._open[handshake] = None
        try:
            with handshake.scope:
                yield handshake
        finally:
            self._open.pop(handshake, None)

    def end_all(self) -> None:
        for handshake in list(self._open):
            self._end(handshake)

    def _evict(self) -> None:
        """The oldest of the host that has most of them."""
        (crowded, _), *_ = Counter(handshake.host for handshake in self._open).most_common(1)
        self._end(next(handshake for handshake in self._open if handshake.host == crowded))

    def _end(self, handshake: Handshake) -> None:
        del self._open[handshake]
        handshake.evicted = True
        handshake.scope.cancel()
