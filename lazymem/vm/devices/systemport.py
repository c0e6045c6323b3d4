"""Port 0x61 of a PC: timer channel 2's gate and output, the speaker, and the memory refresh toggle."""

from __future__ import annotations

from dataclasses import dataclass

from lazymem.vm.clock import Clock
from lazymem.vm.devices.pit import Pit
from lazymem.vm.devices.registers import layout_of, record_from, register, values_of
from lazymem.vm.devicestate import Layout, State

_GATE2, _REFRESH, _OUTPUT2 = 0x01, 0x10, 0x20
_REFRESH_NS = 15_085
"""A refresh request every 18 pulses of the timer clock; each toggles the bit. Old software counts the toggles."""


@dataclass(slots=True)
class SystemPortRegisters:
    """The two bits that a program can set: gate of channel 2 and the speaker."""

    control: int = register(1, maximum=3)


class SystemPort:
    """One register at offset 0. The speaker is heard by nobody."""

    layout: Layout = layout_of(SystemPortRegisters, "system-port", 1)

    def __init__(self, clock: Clock, pit: Pit) -> None:
        self._clock = clock
        self._pit = pit
        self.registers = SystemPortRegisters()

    def read(self, offset: int, size: int) -> int:
        refresh = _REFRESH if self._clock.now_ns() // _REFRESH_NS & 1 else 0
        output = _OUTPUT2 if self._pit.output2() else 0
        return self.registers.control | refresh | output

    def write(self, offset: int, size: int, value: int) -> None:
        self.registers.control = value & 3
        self._pit.set_gate2(bool(value & _GATE2))

    def state(self) -> State:
        return values_of(self.registers)

    def load_state(self, state: State) -> None:
        # The gate's level is in the timer's own state.
        self.registers = record_from(SystemPortRegisters, state)
