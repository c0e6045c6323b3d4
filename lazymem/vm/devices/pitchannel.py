"""One counter of the 8254 timer, as a function of the clock pulses since it was loaded. Pure.

After Intel's data sheet (order 231164). Two simplifications, which no known guest notices: a new count takes effect
when it is written also in modes 2 and 3 (the chip ends the running period first), and the pulse of CLK that loads the
count is not waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

from lazymem.vm.devices.registers import flag, register

CLOCK_HZ = 1_193_182
"""A PC's timer clock, 14.31818 MHz / 12."""

_NS = 1_000_000_000
_LSB, _MSB, _BOTH = 1, 2, 3


def pulses(duration_ns: int) -> int:
    """Whole clock pulses in `duration_ns`."""
    return max(0, duration_ns) * CLOCK_HZ // _NS


def nanoseconds(pulse_count: int) -> int:
    """The shortest time that has `pulse_count` whole pulses."""
    return -(-pulse_count * _NS // CLOCK_HZ)


@dataclass(slots=True)
class ChannelRegisters:
    """`count`: the initial count in pulses, 1 to 65536. `loaded`: a count was written since the control word.
    `start_ns`: when it was loaded. `held`: the gate stopped it `held_pulses` after the load. `triggered`: modes 1 and
    5 saw their trigger. `rises`: rising edges of OUT since the load that were reported."""

    mode: int = register(1, maximum=5)
    bcd: int = flag()
    access: int = register(1, _BOTH, minimum=1, maximum=3)
    count: int = register(4, 0x10000, minimum=1, maximum=0x10000)
    loaded: int = flag()
    start_ns: int = register(8)
    gate: int = flag(True)
    held: int = flag()
    held_pulses: int = register(8)
    triggered: int = flag()
    rises: int = register(8)
    low_byte: int = register(1)
    low_byte_written: int = flag()
    high_byte_next: int = flag()
    latch: int = register(2)
    latched_bytes: int = register(1, maximum=2)
    status: int = register(1)
    status_latched: int = flag()


class PitChannel:
    """Counter and output of one channel; the caller brings virtual time in nanoseconds with each call."""

    def __init__(self) -> None:
        self.registers = ChannelRegisters()

    def set_mode(self, control: int) -> None:
        """A control word for this channel that is no latch command: counting stops until a count is written."""
        old = self.registers
        mode = control >> 1 & 7
        self.registers = ChannelRegisters(
            mode=mode & 3 if mode > 5 else mode,
            bcd=control & 1,
            access=control >> 4 & 3,
            count=old.count,
            gate=old.gate,
        )

    def write(self, value: int, now_ns: int) -> None:
        """A byte of the initial count, as the access mode says."""
        regs = self.registers
        if regs.access == _BOTH and not regs.low_byte_written:
            regs.low_byte, regs.low_byte_written = value, 1
            if regs.mode == 0:
                # The first byte stops a one-shot that is running, so that it cannot end in between.
                regs.loaded = 0
            return
        if regs.access == _BOTH:
            value, regs.low_byte_written = value << 8 | regs.low_byte, 0
        elif regs.access == _MSB:
            value <<= 8
        self._load(value, now_ns)

    def read(self, now_ns: int) -> int:
        """A byte of the latched status, the latched count or the running count, in this order."""
        regs = self.registers
        if regs.status_latched:
            regs.status_latched = 0
            return regs.status
        if regs.latched_bytes:
            byte = regs.latch & 0xFF
            regs.latch >>= 8
            regs.latched_bytes -= 1
            return byte
        value = self.counter(now_ns)
        if regs.access == _MSB:
            return value >> 8
        if regs.access == _LSB:
            return value & 0xFF
        byte = value >> 8 if regs.high_byte_next else value & 0xFF
        regs.high_byte_next ^= 1
        return byte

    def latch_count(self, now_ns: int) -> None:
        """Counter latch command; a second one before the first was read is ignored."""
        regs = self.registers
        if regs.latched_bytes:
            return
        value = self.counter(now_ns)
        regs.latch = value >> 8 if regs.access == _MSB else value
        regs.latched_bytes = 2 if regs.access == _BOTH else 1

    def latch_status(self, now_ns: int) -> None:
        """The status half of the read-back command."""
        regs = self.registers
        if regs.status_latched:
            return
        out, null_count = int(self.output(now_ns)), 1 - regs.loaded
        regs.status = out << 7 | null_count << 6 | regs.access << 4 | regs.mode << 1 | regs.bcd
        regs.status_latched = 1

    def set_gate(self, level: bool, now_ns: int) -> None:
        """The GATE input: stops modes 0, 2, 3 and 4 while low; its rising edge (re)starts modes 1, 2, 3 and 5."""
        regs = self.registers
        if bool(regs.gate) == level:
            return
        elapsed = self._elapsed(now_ns)
        regs.gate = int(level)
        if level and regs.mode in (1, 2, 3, 5):
            regs.held, regs.triggered, regs.start_ns, regs.rises = 0, 1, now_ns, 0
        elif level:
            regs.held, regs.start_ns = 0, now_ns - nanoseconds(regs.held_pulses)
        elif regs.mode not in (1, 5):
            regs.held, regs.held_pulses = 1, elapsed

    def output(self, now_ns: int) -> bool:
        """Level of OUT."""
        regs, elapsed = self.registers, self._elapsed(now_ns)
        if not self._counting():
            return regs.mode != 0
        if regs.mode in (0, 1):
            return elapsed >= regs.count
        if regs.mode in (2, 3) and regs.held:
            return True
        if regs.mode == 2:
            return elapsed % regs.count != regs.count - 1
        if regs.mode == 3:
            return elapsed % regs.count < (regs.count + 1) // 2
        return elapsed != regs.count

    def counter(self, now_ns: int) -> int:
        """The count as a program reads it: 16 bits, or four decimal digits."""
        regs, elapsed = self.registers, self._elapsed(now_ns)
        if not self._counting():
            left = regs.count
        elif regs.mode == 2:
            left = regs.count - elapsed % regs.count
        elif regs.mode == 3:
            # Two at a time, and from the even number below an odd count.
            left = (regs.count & ~1) - 2 * elapsed % max(2, regs.count & ~1)
        else:
            left = regs.count - elapsed
        return _to_bcd(left % 10_000) if regs.bcd else left & 0xFFFF

    def take_rises(self, now_ns: int) -> bool:
        """Whether OUT rose since this was last asked (or since the load)."""
        rises = self._rises(self._elapsed(now_ns))
        risen = rises > self.registers.rises
        self.registers.rises = rises
        return risen

    def next_rise_ns(self) -> int | None:
        """When OUT rises next, after what `take_rises` has seen; None if it does not by itself."""
        regs = self.registers
        if not self._counting() or regs.held:
            return None
        if regs.mode in (2, 3):
            return regs.start_ns + nanoseconds((regs.rises + 1) * regs.count)
        if regs.rises:
            return None
        return regs.start_ns + nanoseconds(regs.count + (regs.mode >= 4))

    def _counting(self) -> bool:
        regs = self.registers
        return bool(regs.loaded and (regs.mode not in (1, 5) or regs.triggered))

    def _elapsed(self, now_ns: int) -> int:
        regs = self.registers
        return regs.held_pulses if regs.held else pulses(now_ns - regs.start_ns)

    def _rises(self, elapsed: int) -> int:
        regs = self.registers
        if not self._counting():
            return 0
        if regs.mode in (2, 3):
            return elapsed // regs.count
        return int(elapsed >= regs.count + (regs.mode >= 4))

    def _load(self, value: int, now_ns: int) -> None:
        regs = self.registers
        regs.count = (_from_bcd(value) or 10_000) if regs.bcd else value or 0x10000
        regs.loaded, regs.start_ns, regs.rises, regs.triggered = 1, now_ns, 0, 0
        regs.held = int(not regs.gate and regs.mode not in (1, 5))
        regs.held_pulses = 0


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))
