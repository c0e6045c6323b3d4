"""What chips are tested with: a clock that is set by hand, and an interrupt line that remembers."""

from __future__ import annotations


class HandClock:
    """`vm.clock.Clock`: stands wherever a test puts it."""

    def __init__(self, now_ns: int = 0) -> None:
        self.ns = now_ns

    def now_ns(self) -> int:
        return self.ns


class LineProbe:
    """An interrupt line: its level, and how often it rose."""

    def __init__(self) -> None:
        self.level = False
        self.rises = 0

    def __call__(self, level: bool) -> None:
        assert level != self.level, "a device calls on changes only"
        self.level = level
        self.rises += level
