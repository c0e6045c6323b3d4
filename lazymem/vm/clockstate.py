"""Virtual time's section in the save stream."""

from __future__ import annotations

from typing import Protocol

from lazymem.errors import SaveStreamError
from lazymem.vm.devicestate import Field, Layout, State

MAX_NS = 1 << 63
"""292 years; a larger value is no time that a guest has lived."""


class SettableClock(Protocol):
    def now_ns(self) -> int: ...

    def set_ns(self, now_ns: int) -> None: ...


class ClockState:
    """Nanoseconds of virtual time since the machine was made; comes before the chips, whose deadlines count in it."""

    layout = Layout("virtual-clock", 1, (Field("now_ns", 8),))

    def __init__(self, clock: SettableClock) -> None:
        self._clock = clock

    def state(self) -> State:
        return {"now_ns": self._clock.now_ns()}

    def load_state(self, state: State) -> None:
        now_ns = state.get("now_ns")
        if not isinstance(now_ns, int) or not 0 <= now_ns < MAX_NS:
            raise SaveStreamError(f"section virtual-clock: now_ns cannot be {now_ns!r}")
        self._clock.set_ns(now_ns)
