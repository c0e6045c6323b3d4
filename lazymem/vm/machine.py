"""A whole guest: blocks, CPU, board and the vCPU's thread; started, stopped, saved and ended from outside.

Threads: one runs the vCPU, one ends its slices; the public methods may be called from any other. The one lock guards
flags and is never held while the guest executes, so everything answers while the vCPU stands on a page of a mount.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from lazymem.errors import GuestCrashError, LazymemError, UsageError
from lazymem.pages import PAGE_SIZE
from lazymem.vm import memorymap
from lazymem.vm.board import Board
from lazymem.vm.boot import load_kernel
from lazymem.vm.bootmemory import RamRegion
from lazymem.vm.clock import InstructionClock, WallClock
from lazymem.vm.clockstate import ClockState
from lazymem.vm.cpu import Cpu
from lazymem.vm.devicestate import Stateful
from lazymem.vm.memorymap import MemoryMap
from lazymem.vm.pacer import SlicePacer
from lazymem.vm.ram import RamBlocks
from lazymem.vm.serial import NullLine, SerialLine
from lazymem.vm.vcpu import CountingExecutor, Outside, WallExecutor

REPEATABLE_EPOCH = 946_684_800
"""2000-01-01, what the calendar shows at the start of an --icount guest."""


class MachineConfig(Struct, frozen=True):
    """What a machine is made of. `epoch_seconds`: the calendar at virtual time 0; None: now (icount: 2000-01-01).

    `icount_sleep`: with icount, idle time passes on the host too; else it is skipped.
    """

    ram_bytes: int
    kernel: Path | None = None
    append: str = ""
    icount: bool = False
    icount_sleep: bool = True
    epoch_seconds: int | None = None

    def __post_init__(self) -> None:
        if not memorymap.MIN_RAM_BYTES <= self.ram_bytes <= memorymap.MAX_RAM_BYTES or self.ram_bytes % PAGE_SIZE:
            raise UsageError(
                f"RAM of {self.ram_bytes} bytes: it must be a multiple of {PAGE_SIZE}, at least "
                f"{memorymap.MIN_RAM_BYTES} and at most {memorymap.MAX_RAM_BYTES}"
            )


def block_sizes(config: MachineConfig) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of each RAM block of the machine, in the save stream's order."""
    return (
        ("pc.ram", config.ram_bytes),
        ("pc.bios", memorymap.BIOS_BYTES),
        ("vga.vram", memorymap.VGA_WINDOW_BYTES),
    )


class Ending(Struct, frozen=True):
    """How a guest ended. `exit_code`: the process's; `error`: None if the guest ended itself."""

    run_state: str
    exit_code: int
    reason: str
    error: LazymemError | None = None


class Machine:
    """See the module. The caller keeps `blocks` open until `close` has returned True."""

    def __init__(self, config: MachineConfig, blocks: RamBlocks, serial: SerialLine | None = None) -> None:
        self.config = config
        self.blocks = blocks
        self.memory = MemoryMap(blocks)
        self._serial = serial or NullLine()
        self._clock: WallClock | InstructionClock = InstructionClock() if config.icount else WallClock()
        self.board = Board(
            self._clock,
            self._serial,
            ram_bytes=config.ram_bytes,
            epoch_seconds=_epoch(config),
            debug_exit=self._debug_exit,
            reset=self._reset,
        )
        interrupts = self.board.interrupts
        self._outside = Outside(self.board.bus, interrupts, self._clock)
        self.cpu = Cpu(self.memory.regions, self._outside)
        self._outside.interrupt_slice = self.cpu.interrupt_slice
        self._pacer: SlicePacer | None = None
        self._executor = self._make_executor()
        self._lock = threading.Condition()
        self._posted: deque[Callable[[], None]] = deque()
        self._wanted = False
        self._standing = True
        self._launched = False
        self._closing = False
        self._ending: Ending | None = None
        self._end_listeners: list[Callable[[Ending], None]] = []
        self._thread: threading.Thread | None = None

    def boot(self) -> None:
        """Load the kernel into RAM and set the CPU to its entry. Not for a machine whose state comes in.

        Raises:
            UsageError: no kernel is configured, or it cannot be loaded.
        """
        if self.config.kernel is None:
            raise UsageError("nothing to run: name a kernel (-kernel) or an incoming state (-incoming)")
        low = min(self.config.ram_bytes, memorymap.LOW_RAM_LIMIT)
        regions = [RamRegion(0, low)]
        if self.config.ram_bytes > low:
            regions.append(RamRegion(memorymap.HIGH_RAM, self.config.ram_bytes - low))
        start = load_kernel(self.config.kernel, self.config.append, regions, self.memory.write)
        self.cpu.reset(start)

    @property
    def run_state(self) -> str:
        """prelaunch, running (also until a stop has taken effect), paused, shutdown, guest-panicked, internal-error."""
        with self._lock:
            if self._ending is not None:
                return self._ending.run_state
            if self._wanted or not self._standing:
                return "running"
            return "paused" if self._launched else "prelaunch"

    @property
    def ending(self) -> Ending | None:
        """None while the guest has not ended."""
        return self._ending

    def start(self) -> None:
        """Let the vCPU run; takes back a stop that has not taken effect. Nothing when the guest has ended."""
        with self._lock:
            if self._ending is not None or self._closing:
                return
            self._wanted = self._launched = True
            first = self._thread is None
            if first:
                # A daemon: a vCPU that waits for a page that never comes must not keep the process alive.
                self._thread = threading.Thread(target=self._run, name="vcpu", daemon=True)
            self._lock.notify_all()
        if first:
            self._serial.start(lambda: self.post(self.board.uart.poll_input))
            assert self._thread is not None
            self._thread.start()
            self.post(self.board.uart.poll_input)

    def stop(self, timeout_seconds: float | None = None) -> bool:
        """Let the vCPU stand, and wait for that; without a bound by default, since it may wait for a page.

        Returns whether it stands; False also when `start` took the stop back.
        """
        self.request_stop()
        with self._lock:
            self._lock.wait_for(lambda: self._standing or self._wanted, timeout_seconds)
            return self._standing

    def request_stop(self) -> None:
        """As `stop`, without the wait."""
        with self._lock:
            self._wanted = False
            self._lock.notify_all()
        self._end_wall_slice()

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the vCPU's thread between two slices, soon; it wakes a halted guest's loop.

        Never while the machine is stopped: then it waits for the next start.
        """
        with self._lock:
            self._posted.append(action)
            self._lock.notify_all()
        self._end_wall_slice()

    def stateful(self) -> list[Stateful]:
        """What is saved and loaded, in order. Only while the machine stands."""
        return [ClockState(self._clock), self.cpu, *self.board.stateful]

    def wait_ended(self, timeout_seconds: float | None = None) -> Ending | None:
        """Wait until the guest has ended by itself; None when it has not."""
        with self._lock:
            self._lock.wait_for(lambda: self._ending is not None, timeout_seconds)
            return self._ending

    def listen_ended(self, listener: Callable[[Ending], None]) -> None:
        """Call `listener` once when the guest ends, on the vCPU's thread (or now, if it has)."""
        with self._lock:
            if self._ending is None:
                self._end_listeners.append(listener)
                return
        listener(self._ending)

    def finish(self, timeout_seconds: float = 5) -> bool:
        """Stop for good. False: the vCPU still waits for a page, and the blocks must stay open."""
        with self._lock:
            self._closing = True
            self._wanted = False
            self._lock.notify_all()
        self._end_wall_slice()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                return False
        self._thread = None
        return True

    def close(self, timeout_seconds: float = 5) -> bool:
        """Stop and give everything back, which may touch pages of a mount. False as with `finish`."""
        if not self.finish(timeout_seconds):
            return False
        if self._pacer is not None:
            self._pacer.close()
            self._pacer = None
        self.cpu.close()
        self._serial.close()
        return True

    def _make_executor(self) -> WallExecutor | CountingExecutor:
        interrupts, timers = self.board.interrupts, self.board.timers
        if isinstance(self._clock, InstructionClock):
            sleep = self.config.icount_sleep
            counting = CountingExecutor(self.cpu, interrupts, timers, self._clock, sleep=sleep)
            self._outside.accessed = counting.accessed_outside
            return counting
        self._pacer = SlicePacer(self.cpu.interrupt_slice)
        return WallExecutor(self.cpu, interrupts, timers, self._clock, self._pacer)

    def _end_wall_slice(self) -> None:
        # With icount a slice ends after its count and never elsewhere, so that every run is cut alike.
        if not self.config.icount:
            self.cpu.interrupt_slice()

    def _run(self) -> None:
        """The vCPU's thread."""
        while self._wait_wanted():
            try:
                self._run_until_unwanted()
            except LazymemError as error:
                state = "guest-panicked" if isinstance(error, GuestCrashError) else "internal-error"
                self._end(Ending(state, error.exit_code, str(error), error))
            except Exception as error:  # noqa: BLE001 (a bug in a device must reach the user, not end one thread)
                bug = LazymemError(f"a bug in lazymem-vm stopped the guest: {error!r}")
                bug.__cause__ = error
                self._end(Ending("internal-error", bug.exit_code, str(bug), bug))

    def _wait_wanted(self) -> bool:
        """Stand until a start; False when the machine closes."""
        with self._lock:
            while not self._closing and not (self._wanted and self._ending is None):
                # At each turn: a start that a stop took back before this thread woke has left it standing.
                self._standing = True
                self._lock.notify_all()
                self._lock.wait()
            self._standing = self._closing
            return not self._closing

    def _run_until_unwanted(self) -> None:
        self._clock.start()
        try:
            while self._wanted and self._ending is None:
                while self._posted:
                    self._posted.popleft()()
                self._executor.step(self._wait_event)
        finally:
            self._clock.stop()

    def _wait_event(self, timeout_ns: int | None) -> bool:
        timeout = None if timeout_ns is None else timeout_ns / 1e9
        with self._lock:
            return self._lock.wait_for(lambda: bool(self._posted) or not self._wanted, timeout)

    def _debug_exit(self, value: int) -> None:
        """As QEMU's isa-debug-exit: the process's exit status is odd, so that 0 is never a guest's."""
        self._end_from_guest(Ending("shutdown", (value << 1 | 1) & 0xFF, f"debug exit with {value:#x}"))

    def _reset(self) -> None:
        """A guest that resets has ended: there is no firmware to boot it again."""
        self._end_from_guest(Ending("shutdown", 0, "reset"))

    def _end_from_guest(self, ending: Ending) -> None:
        self._outside.cut_off()
        self.cpu.interrupt_slice()
        self._end(ending)

    def _end(self, ending: Ending) -> None:
        with self._lock:
            if self._ending is not None:
                return
            self._ending = ending
            self._wanted = False
            listeners, self._end_listeners = self._end_listeners, []
            self._lock.notify_all()
        for listener in listeners:
            # An event loop that the listener wants to tell may be over already.
            with contextlib.suppress(RuntimeError):
                listener(ending)


def _epoch(config: MachineConfig) -> int:
    if config.epoch_seconds is not None:
        return config.epoch_seconds
    return REPEATABLE_EPOCH if config.icount else int(time.time())
