"""What waits to be sent to one client: three lanes, the more urgent one first. Bounded by whoever puts.

Frames of one request share a lane, so their order holds. `wait_below` and `wait_ready` are the only places to wait.
"""

from __future__ import annotations

import enum
from collections import deque

import trio


class Lane(enum.IntEnum):
    CONTROL = 0
    """Greetings, pongs, goodbyes: small and rare."""
    DEMAND = 1
    BACKGROUND = 2


class Output:
    """Frames on their way to one client."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, deque[bytes]] = {lane: deque() for lane in Lane}
        self._unsent = 0
        self._sending = 0
        self._changed = trio.Event()

    @property
    def unsent_bytes(self) -> int:
        """Waiting or handed to the socket and not yet taken by it."""
        return self._unsent + self._sending

    def put(self, frame: bytes, lane: Lane) -> None:
        self._lanes[lane].append(frame)
        self._unsent += len(frame)
        self.wake()

    def wake(self) -> None:
        """Let all waiters look again."""
        if self._changed.statistics().tasks_waiting:
            self._changed.set()
            self._changed = trio.Event()

    async def wait_changed(self) -> None:
        """Wait for the next `put`, `wake`, or end of a send. Check your condition before and after."""
        await self._changed.wait()

    async def wait_below(self, limit_bytes: int) -> None:
        """Wait until less than so much is unsent."""
        while self.unsent_bytes >= limit_bytes:
            await self._changed.wait()

    async def wait_ready(self) -> None:
        """Wait until there is something to send."""
        while not self._unsent:
            await self._changed.wait()

    def take_nowait(self, most_bytes: int) -> bytes:
        """The most urgent frames, joined up to about `most_bytes`; one frame at least. Call `sent` afterwards."""
        found: list[bytes] = []
        for lane in Lane:
            waiting = self._lanes[lane]
            while waiting and (not found or self._sending + len(waiting[0]) <= most_bytes):
                found.append(waiting.popleft())
                self._sending += len(found[-1])
            if waiting:
                break
        self._unsent -= self._sending
        return found[0] if len(found) == 1 else b"".join(found)

    def sent(self) -> None:
        """What was taken has left."""
        self._sending = 0
        self.wake()
