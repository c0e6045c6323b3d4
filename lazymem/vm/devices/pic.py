"""The 8259A interrupt controller: one chip, and the cascaded pair of a PC.

After Intel's data sheet (order 231468). One choice beyond it, that of other emulators and of most chip sets: an edge
stays latched until it is acknowledged, also when the line drops before. With LTIM set a request follows its line, and
one that drops before the acknowledge gives the spurious vector (input 7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazymem.vm.devices.registers import flag, layout_of, record_from, register, values_of
from lazymem.vm.devicestate import Layout, State

CASCADE_LINE = 2
"""The master's input that the slave's output drives."""

_ICW1, _ICW1_NO_ICW4, _ICW1_SINGLE, _ICW1_LEVEL = 0x10, 0x01, 0x02, 0x08
_OCW3 = 0x08


@dataclass(slots=True)
class PicRegisters:
    """`highest` is the input with the highest priority (0 after initialisation). `init_step`: the ICW expected next
    (2, 3, 4), or 0."""

    lines: int = register(1)
    irr: int = register(1)
    imr: int = register(1)
    isr: int = register(1)
    highest: int = register(1, maximum=7)
    vector_base: int = register(1, maximum=0xF8)
    init_step: int = register(1, maximum=4)
    icw1: int = register(1)
    icw3: int = register(1)
    icw4: int = register(1, maximum=0x1F)
    read_isr: int = flag()
    poll: int = flag()
    special_mask: int = flag()
    rotate_in_auto_eoi: int = flag()


def _nothing(_level: bool) -> None:
    """An output pin that leads nowhere."""


class Pic:
    """One 8259A: offset 0 is the command port, offset 1 the data port.

    `raise_int` is called when the chip's INT output changes.
    """

    def __init__(self, raise_int: Callable[[bool], None] = _nothing, *, instance: int = 0, master: bool = True) -> None:
        self._raise_int = raise_int
        self._master = master
        self._output = False
        self.registers = PicRegisters()
        self.layout: Layout = layout_of(PicRegisters, "i8259", 1, instance)

    def set_line(self, line: int, level: bool) -> None:
        """The level on input `line` (0 to 7)."""
        regs, bit = self.registers, 1 << line
        rising = level and not regs.lines & bit
        regs.lines = regs.lines | bit if level else regs.lines & ~bit
        if rising:
            regs.irr |= bit
        elif not level and regs.icw1 & _ICW1_LEVEL:
            regs.irr &= ~bit
        self._update()

    def pending(self) -> bool:
        """Level of INT."""
        return self._output

    def acknowledge(self) -> int:
        """The input (0 to 7) that is now in service, or 7 without a request: the spurious one, which sets no
        ISR bit."""
        line = self._maybe_request()
        if line is None:
            return 7
        self._take(line)
        return line

    def read(self, offset: int, size: int) -> int:
        regs = self.registers
        if regs.poll:
            return self._poll()
        if offset == 1:
            return regs.imr
        return regs.isr if regs.read_isr else regs.irr

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 1:
            self._write_data(value)
        elif value & _ICW1:
            self._initialise(value)
        elif value & _OCW3:
            self._operate(value)
        else:
            self._end_of_interrupt(value)
        self._update()

    def state(self) -> State:
        return values_of(self.registers)

    def load_state(self, state: State) -> None:
        self.registers = record_from(PicRegisters, state)
        # The pin follows the registers; the receiver of the pin's level has its own saved state and is not told.
        self._output = self._maybe_request() is not None

    def _maybe_request(self) -> int | None:
        """The request that INT stands for: unmasked, and above everything in service."""
        regs = self.registers
        wanted = regs.irr & ~regs.imr
        if not wanted or regs.init_step:
            return None
        for step in range(8):
            line = (regs.highest + step) & 7
            # Special fully nested mode: the slave may interrupt its own service, since it has priorities of its own.
            nested = self._master and line == CASCADE_LINE and regs.icw4 & 0x10
            if regs.isr >> line & 1 and not nested:
                if not regs.special_mask:
                    return None
                # In special mask mode what is in service inhibits itself only.
                continue
            if wanted >> line & 1:
                return line
        return None

    def _take(self, line: int) -> None:
        regs, bit = self.registers, 1 << line
        if not (regs.icw1 & _ICW1_LEVEL and regs.lines & bit):
            regs.irr &= ~bit
        if regs.icw4 & 0x02:
            if regs.rotate_in_auto_eoi:
                regs.highest = (line + 1) & 7
        else:
            regs.isr |= bit
        # INT goes low in every acknowledge; without that edge a master would never hear of the next request here.
        self._drive(False)
        self._update()

    def _poll(self) -> int:
        """A read behind OCW3's poll command acknowledges, in place of the CPU's INTA."""
        self.registers.poll = 0
        line = self._maybe_request()
        if line is None:
            return 0
        self._take(line)
        return 0x80 | line

    def _initialise(self, icw1: int) -> None:
        # Edge requests start anew: an input must go low and high again. A level input that stands high asks again.
        lines = self.registers.lines
        irr = lines if icw1 & _ICW1_LEVEL else 0
        self.registers = PicRegisters(lines=lines, irr=irr, icw1=icw1, init_step=2)

    def _write_data(self, value: int) -> None:
        regs = self.registers
        if regs.init_step == 0:
            regs.imr = value
        elif regs.init_step == 2:
            regs.vector_base = value & 0xF8
            regs.init_step = 3 if not regs.icw1 & _ICW1_SINGLE else self._step_to_icw4()
        elif regs.init_step == 3:
            regs.icw3 = value
            regs.init_step = self._step_to_icw4()
        else:
            regs.icw4 = value & 0x1F
            regs.init_step = 0

    def _step_to_icw4(self) -> int:
        return 4 if self.registers.icw1 & _ICW1_NO_ICW4 else 0

    def _operate(self, ocw3: int) -> None:
        regs = self.registers
        regs.poll = int(bool(ocw3 & 0x04))
        if ocw3 & 0x02:
            regs.read_isr = ocw3 & 0x01
        if ocw3 & 0x40:
            regs.special_mask = ocw3 >> 5 & 1

    def _end_of_interrupt(self, ocw2: int) -> None:
        """OCW2: rotate (bit 7), specific (bit 6), EOI (bit 5), input (bits 2 to 0)."""
        regs, command = self.registers, ocw2 >> 5
        if command in (0, 4):
            regs.rotate_in_auto_eoi = command >> 2
            return
        if command == 2:
            return
        if command == 6:
            regs.highest = (ocw2 + 1) & 7
            return
        line = ocw2 & 7 if command & 2 else self._maybe_highest_in_service()
        if line is None:
            return
        regs.isr &= ~(1 << line)
        if command & 4:
            regs.highest = (line + 1) & 7

    def _maybe_highest_in_service(self) -> int | None:
        """What an unspecific EOI ends; in special mask mode masked inputs are left out."""
        regs = self.registers
        serving = regs.isr & ~regs.imr if regs.special_mask else regs.isr
        return next((line for step in range(8) if serving >> (line := (regs.highest + step) & 7) & 1), None)

    def _update(self) -> None:
        self._drive(self._maybe_request() is not None)

    def _drive(self, level: bool) -> None:
        if level != self._output:
            self._output = level
            self._raise_int(level)


class PicPair:
    """A PC's two 8259As: inputs 0 to 7 on the master, 8 to 15 on the slave, whose output is the master's input 2.

    The machine maps `master` at 0x20 and `slave` at 0xA0, and saves both.
    """

    def __init__(self) -> None:
        self.master = Pic()
        self.slave = Pic(self._cascade, instance=1, master=False)

    def line(self, number: int) -> Callable[[bool], None]:
        """The input `number` (0 to 15) as a callable for a device."""
        chip = self.master if number < 8 else self.slave
        return lambda level: chip.set_line(number & 7, level)

    def pending(self) -> bool:
        return self.master.pending()

    def acknowledge(self) -> int:
        """The vector, as two INTA cycles bring it."""
        line = self.master.acknowledge()
        if line != CASCADE_LINE or not self.master.registers.icw3 & 1 << CASCADE_LINE:
            return self.master.registers.vector_base | line
        slave_line = self.slave.acknowledge()
        return self.slave.registers.vector_base | slave_line

    def _cascade(self, level: bool) -> None:
        self.master.set_line(CASCADE_LINE, level)
