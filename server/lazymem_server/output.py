"""What waits to be sent to one client: three lanes, the more urgent one first. Bounded by whoever puts. No sockets.

Frames of one request share a lane, so their order holds. A frame comes in pieces, which nobody joins.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

Piece = bytes | memoryview

MOST_PIECES = 512
"""Of one system call, which takes 1024 (IOV_MAX); a frame has two at most."""


class Lane(enum.IntEnum):
    CONTROL = 0
    """Greetings, pongs, goodbyes: small and rare."""
    DEMAND = 1
    BACKGROUND = 2


class Output:
    """Frames on their way to one client."""

    def __init__(self) -> None:
        self._lanes: tuple[deque[Sequence[Piece]], ...] = tuple(deque() for _ in Lane)
        self._begun: deque[Piece] = deque()
        self.unsent_bytes = 0
        """Of all frames, also of those that were begun."""

    def put(self, frame: Sequence[Piece], lane: Lane) -> None:
        self._lanes[lane].append(frame)
        self.unsent_bytes += sum(map(len, frame))

    def pieces(self, most_bytes: int) -> Sequence[Piece]:
        """What to send next: what was begun, else the most urgent frames up to about `most_bytes`, one at least.

        Call `sent` afterwards. Empty if nothing waits.
        """
        if not self._begun:
            size = 0
            for waiting in self._lanes:
                while waiting and len(self._begun) < MOST_PIECES:
                    if size and size + sum(map(len, waiting[0])) > most_bytes:
                        break
                    frame = waiting.popleft()
                    self._begun.extend(frame)
                    size += sum(map(len, frame))
                if waiting:
                    break
        return self._begun

    def sent(self, count: int) -> bool:
        """So many bytes of `pieces` have left; whether that was all of them."""
        self.unsent_bytes -= count
        begun = self._begun
        while begun and count >= len(begun[0]):
            count -= len(begun.popleft())
        if count:
            begun[0] = memoryview(begun[0])[count:]
        return not begun
