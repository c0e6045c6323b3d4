"""The MC146818 real-time clock and its 128 bytes of CMOS memory.

After Motorola's data sheet. The calendar follows virtual time: it stands while the guest stands, and a resumed guest
goes on where it was, so that a run can be repeated. Two simplifications: the divider bits do not stop the clock, and
the first update after a setting comes one second later (the chip: half a second).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazymem.errors import SaveStreamError
from lazymem.vm.clock import NANOSECONDS, Clock
from lazymem.vm.devices import rtcclock
from lazymem.vm.devices.registers import flag, layout_of, record_from, register, values_of
from lazymem.vm.devicestate import Field, Layout, State

MEMORY_BYTES = 128

_A, _B, _C, _D = 0x0A, 0x0B, 0x0C, 0x0D
_A_UPDATING = 0x80
_B_SET, _B_ENABLES = 0x80, 0x70
_C_IRQ, _C_PERIODIC, _C_ALARM, _C_UPDATE = 0x80, 0x40, 0x20, 0x10
_D_VALID = 0x80
_UPDATE_WARNING_NS = 244_000
"""UIP is set this long before an update, so that a program that saw it clear has time to read all bytes."""

_OSCILLATOR_HZ = 32_768


@dataclass(slots=True)
class CmosRegisters:
    """The calendar showed `base_seconds` (since 1970) at virtual time `base_ns`. `looked_ns`: up to here the flags of
    register C tell what happened."""

    index: int = register(1, maximum=MEMORY_BYTES - 1)
    register_a: int = register(1, 0x26, maximum=0x7F)
    register_b: int = register(1, rtcclock.HOURS_24)
    register_c: int = register(1)
    irq_level: int = flag()
    base_seconds: int = register(8, maximum=rtcclock.LAST_SECOND)
    base_ns: int = register(8)
    looked_ns: int = register(8)


class Cmos:
    """Offset 0: index (bit 7, the NMI mask, is ignored); offset 1: data. In a PC at port 0x70 with IRQ 8.

    `epoch_seconds`: what the calendar shows at virtual time 0. `ram_bytes`: told to firmware-like programs in the usual
    bytes (0x15 to 0x18, 0x30, 0x31, 0x34, 0x35). The machine calls `advance` at each deadline (`vm.clock.Timer`).
    """

    layout: Layout = Layout("mc146818rtc", 1, (*layout_of(CmosRegisters, "", 1).fields, Field("cmos", 128, True)))

    def __init__(
        self, clock: Clock, raise_irq: Callable[[bool], None], *, epoch_seconds: int = 0, ram_bytes: int = 0
    ) -> None:
        self._clock = clock
        self._raise_irq = raise_irq
        self._memory = _memory_with_sizes(ram_bytes)
        self.registers = CmosRegisters(base_seconds=epoch_seconds)

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF
        regs, now_ns = self.registers, self._clock.now_ns()
        if regs.index in rtcclock.TIME_REGISTERS and not regs.register_b & _B_SET:
            return rtcclock.encode(self._calendar(now_ns), regs.register_b)[regs.index]
        if regs.index == _A:
            return regs.register_a | (_A_UPDATING if self._updating(now_ns) else 0)
        if regs.index == _B:
            return regs.register_b
        if regs.index == _C:
            return self._read_flags(now_ns)
        return _D_VALID if regs.index == _D else self._memory[regs.index]

    def write(self, offset: int, size: int, value: int) -> None:
        regs, value = self.registers, value & 0xFF
        if offset == 0:
            regs.index = value & 0x7F
            return
        now_ns = self._clock.now_ns()
        self.advance(now_ns)
        if regs.index in rtcclock.TIME_REGISTERS and not regs.register_b & _B_SET:
            self._show(now_ns)
            self._memory[regs.index] = value
            self._set_calendar(now_ns)
        elif regs.index == _A:
            regs.register_a = value & 0x7F
        elif regs.index == _B:
            self._write_b(value, now_ns)
        elif regs.index not in (_C, _D):
            self._memory[regs.index] = value

    def next_deadline_ns(self) -> int | None:
        """Only an interrupt that is enabled and not raised yet needs a call; flags are found when they are read."""
        regs = self.registers
        deadlines = []
        if regs.register_b & (_C_UPDATE | _C_ALARM) and not regs.register_b & _B_SET:
            second = max(0, regs.looked_ns - regs.base_ns) // NANOSECONDS
            deadlines.append(regs.base_ns + (second + 1) * NANOSECONDS)
        if regs.register_b & _C_PERIODIC and (rate := self._periodic_hz()):
            deadlines.append(-(-(regs.looked_ns * rate // NANOSECONDS + 1) * NANOSECONDS // rate))
        return min(deadlines, default=None)

    def advance(self, now_ns: int) -> None:
        regs = self.registers
        seen_ns, regs.looked_ns = regs.looked_ns, max(regs.looked_ns, now_ns)
        if not regs.register_b & _B_SET:
            before, after = self._calendar(seen_ns), self._calendar(now_ns)
            if after > before:
                regs.register_c |= _C_UPDATE
                if rtcclock.alarm_between(before, after, dict(enumerate(self._memory)), regs.register_b):
                    regs.register_c |= _C_ALARM
        rate = self._periodic_hz()
        if now_ns * rate // NANOSECONDS > seen_ns * rate // NANOSECONDS:
            regs.register_c |= _C_PERIODIC
        self._drive()

    def state(self) -> State:
        return {**values_of(self.registers), "cmos": bytes(self._memory)}

    def load_state(self, state: State) -> None:
        registers, memory = record_from(CmosRegisters, state), state.get("cmos")
        if not isinstance(memory, bytes) or len(memory) != MEMORY_BYTES:
            raise SaveStreamError(f"device state: CMOS memory has {MEMORY_BYTES} bytes")
        self.registers, self._memory = registers, bytearray(memory)

    def _calendar(self, now_ns: int) -> int:
        return self.registers.base_seconds + max(0, now_ns - self.registers.base_ns) // NANOSECONDS

    def _updating(self, now_ns: int) -> bool:
        if self.registers.register_b & _B_SET:
            return False
        return max(0, now_ns - self.registers.base_ns) % NANOSECONDS >= NANOSECONDS - _UPDATE_WARNING_NS

    def _periodic_hz(self) -> int:
        """Rate of the periodic flag: bits 0 to 3 of register A; 0 is none, 1 and 2 repeat 8 and 9."""
        rate = self.registers.register_a & 0xF
        if rate == 0:
            return 0
        return _OSCILLATOR_HZ >> (rate + 7 if rate <= 2 else rate) - 1

    def _read_flags(self, now_ns: int) -> int:
        """Register C; reading it clears it and lets the interrupt line go."""
        self.advance(now_ns)
        flags, self.registers.register_c = self.registers.register_c, 0
        self._drive()
        return flags

    def _write_b(self, value: int, now_ns: int) -> None:
        regs = self.registers
        was_set, is_set = regs.register_b & _B_SET, value & _B_SET
        if is_set and not was_set:
            self._show(now_ns)
        # SET ends with the format that is in force now: programs set both in one write.
        regs.register_b = value & ~_C_UPDATE if is_set else value
        if was_set and not is_set:
            self._set_calendar(now_ns)
        self._drive()

    def _show(self, now_ns: int) -> None:
        """Put the calendar's bytes into memory, where a program can change them."""
        for index, value in rtcclock.encode(self._calendar(now_ns), self.registers.register_b).items():
            self._memory[index] = value

    def _set_calendar(self, now_ns: int) -> None:
        """Take the calendar from memory; bytes that name no moment leave it as it was."""
        seconds = rtcclock.maybe_decode(dict(enumerate(self._memory)), self.registers.register_b)
        if seconds is not None:
            self.registers.base_seconds, self.registers.base_ns = seconds, now_ns

    def _drive(self) -> None:
        regs = self.registers
        level = bool(regs.register_c & regs.register_b & _B_ENABLES)
        regs.register_c = regs.register_c & ~_C_IRQ | (_C_IRQ if level else 0)
        if level != regs.irq_level:
            regs.irq_level = int(level)
            self._raise_irq(level)


def _memory_with_sizes(ram_bytes: int) -> bytearray:
    """CMOS memory as a firmware leaves it: RAM below 640 KiB, between 1 and 64 MiB in KiB, above 16 MiB in 64 KiB."""
    memory = bytearray(MEMORY_BYTES)
    base_kib = min(ram_bytes >> 10, 640)
    extended_kib = min(max(0, (ram_bytes >> 10) - 1024), 0xFFFF)
    above_16m = min(max(0, (ram_bytes >> 16) - 256), 0xFFFF)
    for at, value in ((0x15, base_kib), (0x17, extended_kib), (0x30, extended_kib), (0x34, above_16m)):
        memory[at : at + 2] = value.to_bytes(2, "little")
    return memory
