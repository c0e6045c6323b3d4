"""The events that wait for a side's one task: bounded for whoever is outside, and never lost to who is not."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class EventQueue(Generic[T]):
    """First come, first served. `room`: for so many events of those who can wait with them."""

    def __init__(self, room: int) -> None:
        self._room = trio.Semaphore(room)
        self._here = trio.Semaphore(0)
        self._events: deque[tuple[T, bool]] = deque()

    async def put(self, event: T) -> None:
        """Waits for room: so a peer that says more than is taken is not read from."""
        await self._room.acquire()
        self._append(event, waited=True)

    def put_now(self, event: T) -> None:
        """Of this process or its user, who cannot wait, and says little. What waits already is not added again."""
        if all(event != other for other, _ in self._events):
            self._append(event, waited=False)

    def _append(self, event: T, *, waited: bool) -> None:
        self._events.append((event, waited))
        self._here.release()

    async def take(self) -> T:
        await self._here.acquire()
        event, waited = self._events.popleft()
        if waited:
            self._room.release()
        return event
