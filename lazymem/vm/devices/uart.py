"""The 16550A UART (COM1).

After National Semiconductor's data sheet (PC16550D). Two choices: a byte is sent in the moment it is written, so the
transmitter is always empty; and fewer received bytes than the trigger level raise the time-out interrupt at once, since
what comes from a host comes in one piece and waiting four character times would tell nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazymem.errors import SaveStreamError
from lazymem.vm.devices.registers import flag, layout_of, record_from, register, values_of
from lazymem.vm.devicestate import Field, Layout, State

FIFO_BYTES = 16

_DATA, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
_IER_RECEIVED, _IER_EMPTY, _IER_LINE, _IER_MODEM = 1, 2, 4, 8
_LSR_READY, _LSR_OVERRUN, _LSR_TRANSMITTER_EMPTY = 0x01, 0x02, 0x60
_MCR_OUT2, _MCR_LOOP = 0x08, 0x10
_DLAB = 0x80
_IIR_NONE, _IIR_MODEM, _IIR_EMPTY, _IIR_RECEIVED, _IIR_LINE, _IIR_TIMEOUT = 1, 0, 2, 4, 6, 0xC
_CONNECTED = 0xB0
"""MSR with a terminal at the other end: carrier, data set ready, clear to send."""

_TRIGGER_BYTES = (1, 4, 8, 14)


@dataclass(slots=True)
class UartRegisters:
    """`empty_pending`: the transmitter became empty and nobody read that from IIR yet. `fifo_used`: bytes received."""

    divisor: int = register(2, 12)
    ier: int = register(1, maximum=0xF)
    fcr: int = register(1)
    lcr: int = register(1)
    mcr: int = register(1, maximum=0x1F)
    overrun: int = flag()
    msr: int = register(1, _CONNECTED)
    scratch: int = register(1)
    empty_pending: int = flag()
    irq_level: int = flag()
    fifo_used: int = register(1, maximum=FIFO_BYTES)


class Uart:
    """Offsets 0 to 7, in a PC at port 0x3F8 with IRQ 4.

    `transmit` takes each byte sent. `receive_more(limit)` gives up to `limit` received bytes that wait outside, or
    none; it is asked whenever the receiver has room again. Call `poll_input` when new bytes have come.
    """

    layout: Layout = Layout("serial", 1, (*layout_of(UartRegisters, "", 1).fields, Field("fifo", FIFO_BYTES, True)))

    def __init__(
        self,
        raise_irq: Callable[[bool], None],
        transmit: Callable[[bytes], None],
        receive_more: Callable[[int], bytes],
    ) -> None:
        self._raise_irq = raise_irq
        self._transmit = transmit
        self._receive_more = receive_more
        self._received = bytearray()
        self.registers = UartRegisters()

    def poll_input(self) -> None:
        """Take over what waits outside, as far as there is room. Bytes that do not fit stay there: nothing is lost."""
        room = self._capacity() - len(self._received)
        if room > 0 and not self.registers.mcr & _MCR_LOOP:
            self._received += self._receive_more(room)
            self._update()

    def read(self, offset: int, size: int) -> int:
        regs = self.registers
        if offset == _DATA:
            return regs.divisor & 0xFF if regs.lcr & _DLAB else self._read_data()
        if offset == _IER:
            return regs.divisor >> 8 if regs.lcr & _DLAB else regs.ier
        if offset == _IIR_FCR:
            return self._read_identification()
        if offset == _LSR:
            return self._read_line_status()
        if offset == _MSR:
            return self._read_modem_status()
        return {_LCR: regs.lcr, _MCR: regs.mcr, _SCR: regs.scratch}[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        regs, value = self.registers, value & 0xFF
        if offset == _DATA and regs.lcr & _DLAB:
            regs.divisor = regs.divisor & 0xFF00 | value
        elif offset == _DATA:
            self._write_data(value)
        elif offset == _IER and regs.lcr & _DLAB:
            regs.divisor = regs.divisor & 0xFF | value << 8
        elif offset == _IER:
            self._write_interrupt_enable(value)
        elif offset == _IIR_FCR:
            self._write_fifo_control(value)
        elif offset == _LCR:
            regs.lcr = value
        elif offset == _MCR:
            self._write_modem_control(value)
        elif offset == _SCR:
            regs.scratch = value
        self._update()

    def state(self) -> State:
        return {
            **values_of(self.registers),
            "fifo_used": len(self._received),
            "fifo": bytes(self._received).ljust(FIFO_BYTES, b"\0"),
        }

    def load_state(self, state: State) -> None:
        registers, fifo = record_from(UartRegisters, state), state.get("fifo")
        if not isinstance(fifo, bytes) or len(fifo) != FIFO_BYTES:
            raise SaveStreamError(f"device state: the UART's FIFO has {FIFO_BYTES} bytes")
        self.registers = registers
        self._received = bytearray(fifo[: registers.fifo_used])

    def _capacity(self) -> int:
        return FIFO_BYTES if self.registers.fcr & 1 else 1

    def _read_data(self) -> int:
        if not self._received:
            return 0
        byte = self._received.pop(0)
        # One hand-over for many bytes, not one a byte: ask outside only when nothing is left here.
        if not self._received:
            self.poll_input()
        self._update()
        return byte

    def _write_data(self, value: int) -> None:
        regs = self.registers
        if regs.mcr & _MCR_LOOP:
            self._loop_back(value)
        else:
            self._transmit(bytes((value,)))
        regs.empty_pending = 1

    def _loop_back(self, value: int) -> None:
        if len(self._received) < self._capacity():
            self._received.append(value)
            return
        # A full FIFO keeps what it has; the single register takes the new byte. Both tell of the loss.
        self.registers.overrun = 1
        if not self.registers.fcr & 1:
            self._received[0] = value

    def _write_interrupt_enable(self, value: int) -> None:
        regs = self.registers
        # Enabling the transmitter's interrupt while the transmitter is empty raises it: drivers start that way.
        if value & _IER_EMPTY and not regs.ier & _IER_EMPTY:
            regs.empty_pending = 1
        regs.ier = value & 0xF

    def _write_fifo_control(self, value: int) -> None:
        regs = self.registers
        if (value ^ regs.fcr) & 1 or value & 3 == 3:
            self._received.clear()
        # The other bits can only be written together with the enable bit; the two reset bits clear themselves.
        regs.fcr = value & 0xC9 if value & 1 else 0
        self.poll_input()

    def _write_modem_control(self, value: int) -> None:
        regs = self.registers
        regs.mcr = value & 0x1F
        if value & _MCR_LOOP:
            # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD.
            levels = (value & 2) << 3 | (value & 1) << 5 | (value & 4) << 4 | (value & 8) << 4
        else:
            levels = _CONNECTED
        self._set_modem_lines(levels)
        self.poll_input()

    def _set_modem_lines(self, levels: int) -> None:
        regs = self.registers
        changed = (levels ^ regs.msr) >> 4
        # The ring indicator's change bit tells of its trailing edge only.
        if levels & 0x40:
            changed &= ~4
        regs.msr = levels | regs.msr & 0xF | changed

    def _read_line_status(self) -> int:
        regs = self.registers
        status = _LSR_TRANSMITTER_EMPTY | bool(self._received) | (_LSR_OVERRUN if regs.overrun else 0)
        regs.overrun = 0
        self._update()
        return status

    def _read_modem_status(self) -> int:
        status = self.registers.msr
        self.registers.msr &= 0xF0
        self._update()
        return status

    def _read_identification(self) -> int:
        source = self._interrupt_source()
        if source == _IIR_EMPTY:
            self.registers.empty_pending = 0
            self._update()
        return source | (0xC0 if self.registers.fcr & 1 else 0)

    def _interrupt_source(self) -> int:
        """The highest of the enabled interrupts, in the data sheet's order."""
        regs = self.registers
        if regs.ier & _IER_LINE and regs.overrun:
            return _IIR_LINE
        if regs.ier & _IER_RECEIVED and self._received:
            reached = not regs.fcr & 1 or len(self._received) >= _TRIGGER_BYTES[regs.fcr >> 6]
            return _IIR_RECEIVED if reached else _IIR_TIMEOUT
        if regs.ier & _IER_EMPTY and regs.empty_pending:
            return _IIR_EMPTY
        if regs.ier & _IER_MODEM and regs.msr & 0xF:
            return _IIR_MODEM
        return _IIR_NONE

    def _update(self) -> None:
        """The interrupt reaches the PIC through a gate that OUT2 opens, as every PC has it; closed in loop-back."""
        regs = self.registers
        open_gate = regs.mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2
        level = open_gate and self._interrupt_source() != _IIR_NONE
        if level != regs.irq_level:
            regs.irq_level = int(level)
            self._raise_irq(level)
