"""The 8254 interval timer: three counters, the first of which drives IRQ 0.

A guest that stood still for several periods (a page took its time, interrupts were off) gets one interrupt for all of
them, as with the chip: an edge that nobody took is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazymem.vm.clock import Clock
from lazymem.vm.devices.pitchannel import ChannelRegisters, PitChannel
from lazymem.vm.devices.registers import flag, layout_of, record_from, values_of
from lazymem.vm.devicestate import Layout, State

_CONTROL = 3
_PREFIXES = ("channel0_", "channel1_", "channel2_")


@dataclass(slots=True)
class OutputPin:
    """Counter 0's output as it was last told: a rising edge that is due is told once, also after a load."""

    irq_level: int = flag()


class Pit:
    """Offsets 0 to 2: the counters; 3: the control word. Its place in a PC is port 0x40.

    `raise_irq` follows counter 0's output. The machine calls `advance` at each deadline (`vm.clock.Timer`).
    """

    layout: Layout = layout_of((("", OutputPin), *((prefix, ChannelRegisters) for prefix in _PREFIXES)), "i8254", 1)

    def __init__(self, clock: Clock, raise_irq: Callable[[bool], None]) -> None:
        self._clock = clock
        self._raise_irq = raise_irq
        self._pin = OutputPin()
        self.channels = (PitChannel(), PitChannel(), PitChannel())
        # Counters 1 and 2: only counter 2's gate is wired, to port 0x61, and low at reset.
        self.channels[2].registers.gate = 0

    def read(self, offset: int, size: int) -> int:
        return 0 if offset == _CONTROL else self.channels[offset].read(self._clock.now_ns())

    def write(self, offset: int, size: int, value: int) -> None:
        now_ns, value = self._clock.now_ns(), value & 0xFF
        self.advance(now_ns)
        if offset == _CONTROL:
            self._control(value, now_ns)
        else:
            self.channels[offset].write(value, now_ns)
        self.advance(now_ns)

    def set_gate2(self, level: bool) -> None:
        """Counter 2's gate, from port 0x61."""
        self.channels[2].set_gate(level, self._clock.now_ns())

    def output2(self) -> bool:
        """Counter 2's output, the speaker's tone; software measures time with it."""
        return self.channels[2].output(self._clock.now_ns())

    def next_deadline_ns(self) -> int | None:
        return self.channels[0].next_rise_ns()

    def advance(self, now_ns: int) -> None:
        if self.channels[0].take_rises(now_ns):
            # OUT was low before it rose, even when no deadline fell on that moment.
            self._drive(False)
            self._drive(True)
        self._drive(self.channels[0].output(now_ns))

    def state(self) -> State:
        values = values_of(self._pin)
        for prefix, channel in zip(_PREFIXES, self.channels, strict=True):
            values |= values_of(channel.registers, prefix)
        return values

    def load_state(self, state: State) -> None:
        loaded = [record_from(ChannelRegisters, state, prefix) for prefix in _PREFIXES]
        self._pin = record_from(OutputPin, state)
        for channel, registers in zip(self.channels, loaded, strict=True):
            channel.registers = registers

    def _control(self, value: int, now_ns: int) -> None:
        select = value >> 6
        if select == 3:
            self._read_back(value, now_ns)
        elif value & 0x30:
            self.channels[select].set_mode(value)
        else:
            self.channels[select].latch_count(now_ns)

    def _read_back(self, value: int, now_ns: int) -> None:
        """Latches count (bit 5 low) and status (bit 4 low) of the channels in bits 1 to 3."""
        for number, channel in enumerate(self.channels):
            if not value >> (number + 1) & 1:
                continue
            if not value & 0x20:
                channel.latch_count(now_ns)
            if not value & 0x10:
                channel.latch_status(now_ns)

    def _drive(self, level: bool) -> None:
        if level != self._pin.irq_level:
            self._pin.irq_level = int(level)
            self._raise_irq(level)
