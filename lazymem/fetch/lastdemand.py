"""When somebody last demanded a page: what guesses leave more room after, also those that another process makes."""

from __future__ import annotations

import math
import mmap


class LastDemand:
    """A moment of `perf_counter`, which is the host's and so means the same to every process.

    It is in memory that a fork shares: the parent writes, the child reads; eight aligned bytes are never seen half.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._moment = memoryview(self._memory).cast("d")
        self._moment[0] = -math.inf

    @property
    def seconds(self) -> float:
        """Of `perf_counter`; minus infinity before the first."""
        return self._moment[0]

    @seconds.setter
    def seconds(self, now: float) -> None:
        self._moment[0] = now
