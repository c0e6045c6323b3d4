"""A keyboard controller (8042) without a keyboard: never a key, never busy, but it can reset the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazymem.vm.devices.registers import flag, layout_of, record_from, values_of
from lazymem.vm.devicestate import Layout, State

DATA, COMMAND = 0, 4

_WRITE_OUTPUT_PORT = 0xD1
_PULSE_RESET = 0xFE
_NOT_RESET = 0x01
"""Output port bit 0: the reset line, active low."""


@dataclass(slots=True)
class KeyboardRegisters:
    """`output_port_next`: the next data byte goes to the output port."""

    output_port_next: int = flag()


class Keyboard:
    """Offset 0: data (port 0x60), offset 4: status and command (port 0x64). Every read gives 0: nothing there."""

    layout: Layout = layout_of(KeyboardRegisters, "pckbd", 1)

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self.registers = KeyboardRegisters()

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        to_output_port = self.registers.output_port_next
        self.registers.output_port_next = int(offset == COMMAND and value == _WRITE_OUTPUT_PORT)
        pulse = offset == COMMAND and value == _PULSE_RESET
        if pulse or (offset == DATA and to_output_port and not value & _NOT_RESET):
            self._reset_machine()

    def state(self) -> State:
        return values_of(self.registers)

    def load_state(self, state: State) -> None:
        self.registers = record_from(KeyboardRegisters, state)
