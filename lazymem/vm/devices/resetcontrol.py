"""The reset control register of PC chip sets: a guest asks for a reset. Stateless."""

from __future__ import annotations

from collections.abc import Callable

_RESET_CPU = 0x04


class ResetControl:
    """Offset 0, in a PC at port 0xCF9: a write with bit 2 set calls `reset_machine`; a read gives 0."""

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if value & _RESET_CPU:
            self._reset_machine()
