"""The way out of a session: frames by urgency into the socket, and the end of a client that does not take them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from lazymem_server.counters import Counters
from lazymem_server.ending import SessionEnd
from lazymem_server.limits import ServerLimits
from lazymem_server.output import Lane, Output, Piece


class Outlet:
    """For the connected, non-blocking socket `fd`. `writev`: as `os.writev`; for tests."""

    def __init__(
        self,
        fd: int,
        limits: ServerLimits,
        counters: Counters,
        writev: Callable[[int, Sequence[Piece]], int] = os.writev,
    ) -> None:
        self._fd = fd
        self._limits = limits
        self._writev = writev
        self._output = Output()
        self.stuck_at: float | None = None
        """Since when (monotonic) the socket took neither all that it got nor `send_bytes`. None: nothing waits, or it
        was not tried yet."""
        self._sent_since = 0
        self._counters = counters

    @property
    def unsent_bytes(self) -> int:
        return self._output.unsent_bytes

    def put(self, frame: Sequence[Piece], lane: Lane) -> None:
        """A frame, in pieces, to be sent by `flush`."""
        self._output.put(frame, lane)

    def flush(self, most_bytes: int) -> None:
        """Hand the socket what it takes of the most urgent frames, about `most_bytes` of them.

        Raises:
            SessionEnd: it has taken too little for too long.
        """
        output = self._output
        if not output.unsent_bytes:
            return
        sent = self.write(output.pieces(min(most_bytes, self._limits.send_bytes)))
        self._sent_since += sent
        takes_all = output.sent(sent)
        if not output.unsent_bytes:
            self.stuck_at = None
        elif takes_all or self.stuck_at is None or self._sent_since >= self._limits.send_bytes:
            self.stuck_at, self._sent_since = time.monotonic(), 0
        else:
            self.check_pace(time.monotonic())

    def check_pace(self, now: float) -> None:
        """Raises SessionEnd when the client has taken too little for too long."""
        if self.stuck_at is not None and now >= self.stuck_at + self._limits.send_seconds:
            raise SessionEnd("dropped: it takes its answers too slowly")

    def write(self, pieces: Sequence[Piece]) -> int:
        """Past what waits: only for who knows that nothing does. How many bytes the socket took."""
        try:
            sent = self._writev(self._fd, pieces)
        except BlockingIOError:
            return 0
        self._counters.bytes_sent += sent
        return sent
