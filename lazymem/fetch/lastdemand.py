"""What who guesses in another process must know of the demands: when the last one was, whether guesses around it are
worth more than a sweep, and whether demands can be sent."""

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
        self._moment[1] = 1.0
        self._moment[2] = 0.0

    @property
    def seconds(self) -> float:
        """Of `perf_counter`; minus infinity before the first."""
        return self._moment[0]

    @seconds.setter
    def seconds(self, now: float) -> None:
        self._moment[0] = now

    @property
    def is_near(self) -> bool:
        """Whether the latest demands were near each other, so that what surrounds them comes before anything else."""
        return self._moment[2] != 0.0

    @is_near.setter
    def is_near(self, yes: bool) -> None:
        self._moment[2] = float(yes)

    @property
    def can_be_sent(self) -> bool:
        """Whether demands have a connection: as long as they have none, guesses must not have one either."""
        return self._moment[1] != 0.0

    @can_be_sent.setter
    def can_be_sent(self, yes: bool) -> None:
        self._moment[1] = float(yes)
