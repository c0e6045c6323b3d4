"""Virtual time of a guest, in nanoseconds since the machine was made; it stands while the guest is stopped.

Two clocks with one interface: `WallClock` follows the host's monotonic clock, `InstructionClock` counts executed
instructions and so runs the same in every run, however the run was cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

NANOSECONDS = 1_000_000_000


class Clock(Protocol):
    """What a device sees of time."""

    def now_ns(self) -> int:
        """Virtual time; never goes backwards, also across saving and loading."""
        ...


class Timer(Protocol):
    """A device that acts by itself at a moment (PIT, RTC)."""

    def next_deadline_ns(self) -> int | None:
        """Virtual time of its next action, or None. It may lie in the past. Asked before each slice: cheap."""
        ...

    def advance(self, now_ns: int) -> None:
        """Do everything that is due up to `now_ns`; afterwards the next deadline is later than `now_ns`."""
        ...


def earliest_deadline_ns(timers: Iterable[Timer]) -> int | None:
    """The next moment at which any of `timers` acts."""
    return min((at for timer in timers if (at := timer.next_deadline_ns()) is not None), default=None)


class WallClock:
    """Follows the host's monotonic clock while running; stands when stopped."""

    def __init__(self, host_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._host_ns = host_ns
        self._base_ns = 0
        self._started_at: int | None = None

    def now_ns(self) -> int:
        if self._started_at is None:
            return self._base_ns
        return self._base_ns + self._host_ns() - self._started_at

    def start(self) -> None:
        if self._started_at is None:
            self._started_at = self._host_ns()

    def stop(self) -> None:
        self._base_ns = self.now_ns()
        self._started_at = None

    def set_ns(self, now_ns: int) -> None:
        """Take over a saved guest's time; only while stopped."""
        assert self._started_at is None
        self._base_ns = now_ns


NS_PER_INSTRUCTION = 8
"""125 million instructions a virtual second: about what count-limited slices really reach, so that virtual and real
time pass alike."""


OUTSIDE_ACCESS_NS = 1000
"""About what an access to a port takes on a PC's ISA bus; charged for reading the time stamp counter, too. Without it,
a guest that polls until time has passed would poll for ever: an access costs the host a hundred times what an
instruction costs."""


class InstructionClock:
    """Advances by executed instructions, by accesses to the outside and, while the guest halts, by jumps to the next
    deadline; by nothing else."""

    def __init__(self) -> None:
        self._now_ns = 0

    def now_ns(self) -> int:
        return self._now_ns

    def start(self) -> None:
        """Nothing: time is counted, not measured."""

    def stop(self) -> None:
        """Nothing."""

    def set_ns(self, now_ns: int) -> None:
        self._now_ns = now_ns

    def executed(self, instructions: int) -> None:
        self._now_ns += instructions * NS_PER_INSTRUCTION

    def accessed_outside(self) -> None:
        self._now_ns += OUTSIDE_ACCESS_NS

    def jump_to(self, now_ns: int) -> None:
        """Idle until `now_ns`."""
        self._now_ns = max(self._now_ns, now_ns)
