"""One direction of a link: a first-in-first-out wire with one rate, a bounded queue before it, a delay behind it. Pure.

Times are seconds of any one clock. What is put in waits for what was put in before it, takes `length / rate` on the
wire, and arrives `delay` later; lateness of whoever calls moves arrivals only if the wire stood idle meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

PIECE_SECONDS = 0.0002
"""A piece arrives as a whole, so it should be short on the wire; shorter ones cost the relay more than they gain."""

MIN_PIECE_BYTES = 2 * 1448
MAX_PIECE_BYTES = 64 * 1024
MIN_QUEUE_BYTES = 4 * MIN_PIECE_BYTES


class Wire(Generic[T]):
    """`rate_bytes` a second; `delay_seconds` one way. The queue holds two bandwidth-delay products of a round trip."""

    def __init__(self, rate_bytes: float, delay_seconds: float) -> None:
        self.rate_bytes = rate_bytes
        self.delay_seconds = delay_seconds
        self.piece_bytes = round(min(max(rate_bytes * PIECE_SECONDS, MIN_PIECE_BYTES), MAX_PIECE_BYTES))
        self.queue_bytes = max(round(2 * rate_bytes * 2 * delay_seconds), 2 * self.piece_bytes, MIN_QUEUE_BYTES)
        self.carried_bytes = 0
        self._free_at = 0.0
        self._arriving: deque[tuple[float, T]] = deque()
        self._full_seconds = (self.queue_bytes - self.piece_bytes) / rate_bytes

    def room(self, now: float) -> int:
        """Bytes that the queue takes now. What waits leaves it at the rate, byte by byte."""
        return self.queue_bytes - math.ceil(max(0.0, self._free_at - now) * self.rate_bytes)

    def put(self, now: float, length: int, what: T) -> None:
        """Queue `length` bytes; `what` comes out of `arrived` in its time."""
        self._free_at = max(self._free_at, now) + length / self.rate_bytes
        self.carried_bytes += length
        self._arriving.append((self._free_at + self.delay_seconds, what))

    def arrived(self, now: float) -> T | None:
        """The next thing that has arrived, in the order of `put`; None if none has."""
        if self._arriving and self._arriving[0][0] <= now:
            return self._arriving.popleft()[1]
        return None

    @property
    def under_way(self) -> int:
        """Things put in that have not come out."""
        return len(self._arriving)

    def next_event(self, now: float) -> float:
        """When something arrives, or a full queue has room for one more piece; infinite if nothing is under way."""
        at = self._arriving[0][0] if self._arriving else math.inf
        room_at = self._free_at - self._full_seconds
        return min(at, room_at) if room_at > now else at
