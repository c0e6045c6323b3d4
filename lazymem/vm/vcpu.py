"""How a vCPU spends its time: timers, interrupts, slices of execution, idling in HLT. No threads are made here.

Two ways, with one interface. By the wall clock a slice ends when a `Pacer` ends it; by instructions it ends after a
count that depends on nothing but the guest's state, and a whole slice is charged to virtual time even when HLT ended
it early: the library does not tell how much was executed, and a guess would depend on where the run was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lazymem.vm.bus import Bus, InterruptController
from lazymem.vm.clock import NS_PER_INSTRUCTION, Clock, InstructionClock, Timer, WallClock, earliest_deadline_ns
from lazymem.vm.cpu import Cpu

MAX_WALL_SLICE_NS = 5_000_000
"""Bounds the time in which nothing but a guest's own accesses is noticed; stops and input end a slice themselves."""

IMPATIENT_SLICE_NS = 200_000
"""While an interrupt waits for the guest to allow it, which only the end of a slice shows."""

MAX_SLICE_INSTRUCTIONS = 50_000
"""0.4 ms of virtual time. Larger ones are hardly faster, smaller ones are (100,000: 143 MIPS, 10,000: 113)."""


class Pacer(Protocol):
    """Ends slices at a time, from another thread."""

    def arm(self, after_ns: int) -> None: ...

    def disarm(self) -> None: ...


Wait = Callable[[int | None], bool]
"""Waits up to so many nanoseconds (None: for ever) for an event from outside; True when one came."""


class Outside:
    """What the CPU reaches outside of itself: the bus and the time.

    Behind each write comes a look at the interrupt line: a request that the guest itself raised is delivered at once,
    not at the end of the slice.
    """

    def __init__(self, bus: Bus, interrupts: InterruptController, clock: Clock) -> None:
        self._bus = bus
        self._clock = clock
        self._interrupts = interrupts
        self._cut_off = False
        self.accessed: Callable[[], None] = _nothing
        self.interrupt_slice: Callable[[], None] = _nothing

    def cut_off(self) -> None:
        """The machine has ended: what the guest still does before its slice ends reaches nobody."""
        self._cut_off = True

    def read_port(self, port: int, size: int) -> int:
        self.accessed()
        return 0 if self._cut_off else self._bus.read_port(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        self.accessed()
        if self._cut_off:
            return
        before = self._interrupts.pending()
        self._bus.write_port(port, size, value)
        if self._interrupts.pending() and not before:
            self.interrupt_slice()

    def time_stamp(self) -> int:
        """The counter runs at 1 GHz of virtual time, so that it goes on where it was after a resume."""
        self.accessed()
        return self._clock.now_ns()


def _nothing() -> None:
    pass


class Executor:
    """What both ways have in common: `step` does one round; the caller looks for reasons to stop between rounds."""

    def __init__(self, cpu: Cpu, interrupts: InterruptController, timers: Sequence[Timer]) -> None:
        self._cpu = cpu
        self._interrupts = interrupts
        self._timers = timers

    def _serve(self, now_ns: int) -> int | None:
        """Let timers act and deliver an interrupt, if one may be. Returns the next deadline."""
        acted = False
        for timer in self._timers:
            deadline = timer.next_deadline_ns()
            if deadline is not None and deadline <= now_ns:
                timer.advance(now_ns)
                acted = True
        if self._interrupts.pending() and self._cpu.interruptible():
            self._cpu.deliver_interrupt(self._interrupts.acknowledge())
        elif acted:
            self._cpu.reconsider_halt()
        return earliest_deadline_ns(self._timers)

    @property
    def _asleep_for_ever(self) -> bool:
        """HLT with interrupts off: no timer will end it."""
        return self._cpu.halted and not self._cpu.interrupts_enabled


class WallExecutor(Executor):
    """Runs at full speed; virtual time is the host's."""

    def __init__(
        self,
        cpu: Cpu,
        interrupts: InterruptController,
        timers: Sequence[Timer],
        clock: WallClock,
        pacer: Pacer,
    ) -> None:
        super().__init__(cpu, interrupts, timers)
        self._clock = clock
        self._pacer = pacer

    def step(self, wait: Wait) -> None:
        deadline = self._serve(self._clock.now_ns())
        remaining = None if deadline is None else max(0, deadline - self._clock.now_ns())
        if self._cpu.halted:
            wait(None if self._asleep_for_ever else remaining)
            return
        limit = IMPATIENT_SLICE_NS if self._interrupts.pending() else MAX_WALL_SLICE_NS
        self._pacer.arm(limit if remaining is None else min(limit, remaining))
        try:
            self._cpu.run(0, wakes=deadline is not None)
        finally:
            self._pacer.disarm()


class CountingExecutor(Executor):
    """Runs the same way every time; virtual time is executed instructions."""

    def __init__(
        self,
        cpu: Cpu,
        interrupts: InterruptController,
        timers: Sequence[Timer],
        clock: InstructionClock,
        *,
        sleep: bool,
    ) -> None:
        """`sleep`: idle time passes on the host too, else it is skipped."""
        super().__init__(cpu, interrupts, timers)
        self._clock = clock
        self._sleep = sleep
        self._deadline_ns: int | None = None

    def accessed_outside(self) -> None:
        """Charge an access; when the next deadline is reached by it, the slice ends."""
        self._clock.accessed_outside()
        if self._deadline_ns is not None and self._clock.now_ns() >= self._deadline_ns:
            self._cpu.interrupt_slice()

    def step(self, wait: Wait) -> None:
        now = self._clock.now_ns()
        deadline = self._serve(now)
        if self._cpu.halted:
            self._idle(now, deadline, wait)
            return
        count = self._slice_instructions(now, deadline)
        self._deadline_ns = deadline
        self._cpu.run(count, wakes=deadline is not None)
        self._clock.executed(count)

    def _slice_instructions(self, now_ns: int, deadline_ns: int | None) -> int:
        if self._interrupts.pending() and self._cpu.interrupts_enabled:
            # Only the shadow of STI keeps the interrupt back: it lasts one instruction.
            return 1
        if deadline_ns is None:
            return MAX_SLICE_INSTRUCTIONS
        until_deadline = -(-(deadline_ns - now_ns) // NS_PER_INSTRUCTION)
        return max(1, min(MAX_SLICE_INSTRUCTIONS, until_deadline))

    def _idle(self, now_ns: int, deadline_ns: int | None, wait: Wait) -> None:
        if deadline_ns is None or self._asleep_for_ever:
            wait(None)
        elif not (self._sleep and wait(deadline_ns - now_ns)):
            self._clock.jump_to(deadline_ns)
