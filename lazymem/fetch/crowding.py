"""Whether the host's processors are all taken, seen from a process that gives way: how long it waits for one.

Source: /proc/thread-self/schedstat (Linux, CONFIG_SCHED_INFO): nanoseconds run, nanoseconds runnable and waiting.
"""

from __future__ import annotations

import os
from time import perf_counter

LOOK_SECONDS = 0.05
"""Between two looks: several of the scheduler's slices, and soon enough for a guest that has just resumed."""

CROWDED = 0.4
"""Of the time in which it could have run. A pair of processes that share a core see a half."""

FIRST_PAUSE_SECONDS = 0.02
MAX_PAUSE_SECONDS = 0.4
"""The fill goes on at a tenth of its rate where a host is never idle, and a moment of idleness is not missed long."""


class Crowding:
    """Made and used on one thread. Where the kernel does not say, nothing is ever crowded."""

    def __init__(self, path: str = "/proc/thread-self/schedstat") -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1
        self._ran, self._waited = self._times()
        self._looked_at = perf_counter()
        self._pause = 0.0

    def pause_seconds(self) -> float:
        """How long to leave the processors to others now; 0 as long as some are idle. Cheap: looks now and then."""
        now = perf_counter()
        if now - self._looked_at < LOOK_SECONDS:
            return 0.0
        ran, waited = self._times()
        could = ran - self._ran + waited - self._waited
        share = (waited - self._waited) / could if could else 0.0
        self._ran, self._waited, self._looked_at = ran, waited, now
        self._pause = next_pause(self._pause, share)
        return self._pause

    def _times(self) -> tuple[int, int]:
        if self._fd < 0:
            return 0, 0
        ran, waited, _ = os.pread(self._fd, 100, 0).split()
        return int(ran), int(waited)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def next_pause(pause: float, share: float) -> float:
    """Pure: twice as long while crowded, half as long while not, none once it is too short to matter."""
    if share > CROWDED:
        return min(MAX_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, 2 * pause))
    return pause / 2 if pause > FIRST_PAUSE_SECONDS else 0.0
