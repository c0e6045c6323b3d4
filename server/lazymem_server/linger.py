"""How long a session waits on the processor for a client's next fault before it sleeps.

A guest's faults come one after the other, a few microseconds behind the answer to the last one, and to sleep and be
woken costs as much as all of an answer's work. But a processor that waits is nobody else's, so it is done only where
it pays: one session of the whole server at a time, for as long as the next request has mostly come within, and not at
all for a while after others turned out to want the processor. Any thread may use its own `Linger`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import perf_counter

MOST_SECONDS = 0.0001
LEAST_SECONDS = 0.000005
"""Halved each time nothing came, and all of it again when something came that would have been worth it."""

PUT_ASIDE_SECONDS = 0.001
CROWDED_SECONDS = 0.05
"""After the processor was taken from us for the first of these times, nothing is waited for on it for the second."""

Poll = Callable[[int], list[tuple[int, int]]]


class Linger:
    """One session's. `turn`: whoever holds it waits on the processor; all sessions share it."""

    def __init__(self, turn: threading.Lock) -> None:
        self._turn = turn
        self._seconds = LEAST_SECONDS
        self._crowded_until = 0.0

    def poll(self, poll: Poll, patience_ms: int) -> list[tuple[int, int]]:
        """As ``poll(patience_ms)`` of an object of `select.poll`."""
        begun = perf_counter()
        if begun >= self._crowded_until and self._turn.acquire(blocking=False):
            try:
                found = self._wait(poll, begun)
            finally:
                self._turn.release()
            if found:
                return found
        found = poll(patience_ms)
        if found and perf_counter() - begun < MOST_SECONDS:
            self._seconds = MOST_SECONDS
        return found

    def _wait(self, poll: Poll, begun: float) -> list[tuple[int, int]]:
        now, ends = begun, begun + self._seconds
        while now < ends:
            found = poll(0)
            if found:
                self._seconds = MOST_SECONDS
                return found
            os.sched_yield()
            before, now = now, perf_counter()
            if now - before > PUT_ASIDE_SECONDS:
                self._crowded_until = now + CROWDED_SECONDS
                return []
        self._seconds = max(self._seconds / 2, LEAST_SECONDS)
        return []
