"""The debug-exit port: a guest ends its machine with a number. Stateless."""

from __future__ import annotations

from collections.abc import Callable


class DebugExit:
    """A write of any size at offset 0 calls `end_machine` with the value; a read gives 0. In a PC at port 0xF4."""

    def __init__(self, end_machine: Callable[[int], None]) -> None:
        self._end_machine = end_machine

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._end_machine(value)
