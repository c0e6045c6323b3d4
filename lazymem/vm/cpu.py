"""The virtual CPU: one x86-64 core, with the interrupts and exceptions that the Unicorn library leaves out.

Caveat: the library does not tell why a slice ended. HLT is recognised by a hook at the addresses where one was seen.
No lock is held while a slice runs: it may stand for minutes on a page of a mount.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NoReturn, Protocol

from lazymem.errors import GuestCrashError, SaveStreamError
from lazymem.vm import cpu_state
from lazymem.vm.cpu_context import ContextImage, Segment
from lazymem.vm.cpu_engine import Engine, EngineError, Leaf, MappedRegion, context_shape, library_version
from lazymem.vm.cpu_exceptions import FLAG_IF, INVALID_OPCODE, Event, TripleFaultError, deliver, translate
from lazymem.vm.cpu_identity import cpuid
from lazymem.vm.devicestate import State
from lazymem.vm.startstate import StartState

_START_CR4 = 0x620
_START_EFER = 0xD01
_START_CR0 = 0x8001_0033
_CODE_FLAGS = 0x00A0_9B00
_DATA_FLAGS = 0x00C0_9300
_FLAT_LIMIT = 0xFFFF_FFFF
_HLT, _CLI = 0xF4, 0xFA
_WORD = (1 << 64) - 1
_SYSTEM_CALL_BYTES = 2
"""Length of SYSCALL and of SYSENTER."""


class Surroundings(Protocol):
    """What a CPU reaches outside of itself; called in the middle of a slice."""

    def read_port(self, port: int, size: int) -> int: ...

    def write_port(self, port: int, size: int, value: int) -> None: ...

    def time_stamp(self) -> int:
        """What RDTSC reads."""
        ...


class Cpu:
    """One core. Everything but `interrupt_slice` belongs to one thread at a time.

    `halted`: the guest waits in HLT; `deliver_interrupt` ends that, and `reconsider_halt`.
    """

    def __init__(self, regions: Sequence[MappedRegion], outside: Surroundings) -> None:
        """The memory at the regions' host pointers must stay mapped until `close`."""
        self.layout = cpu_state.layout(context_shape().size)
        self.halted = False
        self._halt_unsure = False
        self._outside = outside
        # Held only around a flag and a call that does not wait.
        self._slice_lock = threading.Lock()
        self._in_slice = False
        self._stop_asked = False
        self._system_call = False
        self._halt_sites: list[int] = []
        self._halt_reached: int | None = None
        self._engine = Engine(regions, self)

    def close(self) -> None:
        """Let go of the memory; nothing else may be called afterwards."""
        self._engine.close()

    def reset(self, start: StartState) -> None:
        """Enter 64-bit mode at `start`; RAM holds the page tables and the kernel already."""
        self._engine.enter_long_mode(start.cr3, _START_CR4, _START_EFER, _START_CR0)
        image = self._engine.image()
        for number, value in {0: start.rax, 3: start.rbx, 4: start.rsp, 6: start.rsi, 7: start.rdi}.items():
            image.set_gpr(number, value)
        image.set_segment("cs", Segment(start.code_selector, 0, _FLAT_LIMIT, _CODE_FLAGS))
        for name in ("ss", "ds", "es", "fs", "gs"):
            image.set_segment(name, Segment(start.data_selector, 0, _FLAT_LIMIT, _DATA_FLAGS))
        image.set_segment("gdt", Segment(0, start.gdt_base, start.gdt_limit, 0))
        image.set_segment("idt", Segment(0, 0, 0, 0))
        image.set_segment("ldt", Segment(0, 0, 0xFFFF, 0x8200))
        image.set_segment("tr", Segment(0, 0, 0xFFFF, 0x8B00))
        image.enter_64_bit(0)
        image.rip = start.rip
        self._engine.restore(image)
        self.halted = False

    def run(self, count: int, *, wakes: bool) -> None:
        """Execute until `interrupt_slice`, HLT, or `count` instructions (0: no count; always or never with one).

        `wakes`: a timer will end a HLT; decides only cases that cannot be told apart (see `_settle_halt`).

        Raises:
            GuestCrashError: triple fault, access to no memory, or what the library cannot do.
        """
        self._halt_reached = None
        with self._slice_lock:
            self._in_slice, self._stop_asked = True, False
        try:
            excepted = self._engine.run(self._engine.rip, count)
        except EngineError as error:
            raise self._crash(f"the CPU cannot go on: {error}") from error
        finally:
            with self._slice_lock:
                self._in_slice = False
        if self._system_call:
            self._refuse_system_call()
        elif not excepted:
            self._settle_halt(counted=bool(count), wakes=wakes)

    def interrupt_slice(self) -> None:
        """End the slice that runs now; from any thread. No effect between slices, and sometimes lost: ask again."""
        # A stop that reached the next slice, whose flag is still down, would be taken for a HLT there.
        with self._slice_lock:
            if self._in_slice:
                self._stop_asked = True
                self._engine.stop()

    @property
    def interrupts_enabled(self) -> bool:
        """IF is set."""
        return bool(self._engine.rflags & FLAG_IF)

    def interruptible(self) -> bool:
        """Whether an interrupt may be delivered now: IF is set and no STI or SS load shadows it."""
        return self.interrupts_enabled and not self._engine.image().interrupts_shadowed

    def deliver_interrupt(self, vector: int) -> None:
        """Enter the guest's handler for a hardware interrupt, between slices.

        Raises:
            GuestCrashError: no handler, and none for the faults that follow from that.
        """
        self.halted = False
        self._engine.restore(self._entered(Event(vector, external=True)))

    def reconsider_halt(self) -> None:
        """A timer that should have ended the HLT has acted, and no interrupt is there (it is masked, say).

        If HLT was no more than a guess, the guest goes on: an end of HLT without a reason is something that its code
        has to bear (it halts again, and then that is known), while one that never ends would be a hung guest.
        """
        if self.halted and self._halt_unsure and self.interrupts_enabled:
            self.halted = self._halt_unsure = False

    def registers_text(self) -> str:
        """A dump of the registers for a person."""
        image = self._engine.image()
        registers = cpu_state.named_registers(image, self._engine.rflags, self._engine.efer)
        return cpu_state.dump(registers, self._maybe_code(image, image.rip, 16))

    def state(self) -> State:
        image = self._engine.image()
        named = cpu_state.named_registers(image, self._engine.rflags, self._engine.efer)
        msrs = {f"msr_{msr:03x}": self._engine.msr(msr) for msr in cpu_state.MTRR_MSRS}
        sites = {"halt_sites": cpu_state.packed_sites(self._halt_sites)}
        context = cpu_state.context_fields(image.saved(), library_version())
        return {**named, "halted": int(self.halted), **sites, **msrs, **context}

    def load_state(self, state: State) -> None:
        image = self._engine.image()
        context = cpu_state.checked_context(state, library_version(), len(image.data))
        sites = cpu_state.unpacked_sites(state.get("halt_sites"))
        msrs = cpu_state.checked_msrs(state)
        halted = state.get("halted")
        if halted not in (0, 1):
            raise SaveStreamError(f"section cpu: halted cannot be {halted!r}")
        image.take_over(context)
        self._engine.restore(image)
        for msr, value in msrs.items():
            self._engine.set_msr(msr, value)
        self._engine.forget_translations(image.cr(3))
        self.halted = self._halt_unsure = bool(halted)
        for site in sites:
            self._watch_halt(site)

    def port_in(self, port: int, size: int) -> int:
        return self._outside.read_port(port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        self._outside.write_port(port, size, value)

    def cpuid(self, leaf: int, subleaf: int) -> Leaf:
        return cpuid(leaf, subleaf)

    def time_stamp(self) -> int:
        return self._outside.time_stamp()

    def system_call(self) -> None:
        """CPUID offers none. Delivered behind the slice: the engine moves RIP on after this."""
        self._system_call = True
        self.interrupt_slice()

    def exception(self, vector: int) -> None:
        image = self._engine.image()
        software = image.software_interrupt
        event = Event(vector, 0 if software else image.error_code, software=software)
        self._engine.enter_handler(self._entered(event))

    def invalid_opcode(self) -> None:
        self._engine.enter_handler(self._entered(Event(INVALID_OPCODE)))

    def no_memory(self, kind: str, address: int, size: int) -> NoReturn:
        raise self._crash(f"{kind} of {size} bytes at physical address {address:#x}, where there is no memory")

    def halt_site(self, address: int) -> None:
        self._halt_reached = address & _WORD

    def _entered(self, event: Event) -> ContextImage:
        """The registers at the first instruction of the guest's handler for `event`."""
        image = self._engine.image()
        if not image.long_mode:
            raise self._crash(f"{event} outside of 64-bit mode, which is all that this machine delivers in")
        try:
            deliver(image, self._engine, event, self._engine.rflags)
        except TripleFaultError as error:
            raise self._crash(f"triple fault: {error}") from error
        except LookupError as error:
            where = f"physical address {error}, where there is no memory"
            raise self._crash(f"a descriptor table or the stack for {event} is at {where}") from error
        return image

    def _refuse_system_call(self) -> None:
        self._system_call = False
        image = self._engine.image()
        image.rip -= _SYSTEM_CALL_BYTES
        self._engine.restore(image)
        self._engine.restore(self._entered(Event(INVALID_OPCODE)))

    def _settle_halt(self, *, counted: bool, wakes: bool) -> None:
        """Whether the slice that just ended, ended by HLT.

        Sure cases: nobody asked for an end; or the hook before a known HLT came, and RIP is behind it. In the
        remaining case, a first HLT that coincides with another reason to end, the byte before RIP decides, and only
        where a mistake is harmless: where a timer will wake the guest (a HLT may end early or late; `reconsider_halt`
        is for a timer that nobody hears), or behind CLI.
        """
        self._halt_unsure = False
        rip = self._engine.rip
        site = (rip - 1) & _WORD
        if self._halt_reached is not None:
            self.halted = self._halt_reached == site
        elif not counted and not self._stop_asked:
            self.halted = True
        elif site not in self._halt_sites:
            before = self._maybe_code(self._engine.image(), rip - 2, 2)
            if before is None or before[1] != _HLT:
                return
            self._watch_halt(site)
            self._halt_unsure = self.interrupts_enabled
            self.halted = wakes if self._halt_unsure else before[0] == _CLI

    def _watch_halt(self, address: int) -> None:
        if len(self._halt_sites) < cpu_state.MAX_HALT_SITES and address not in self._halt_sites:
            self._halt_sites.append(address)
            self._engine.watch(address)

    def _crash(self, reason: str) -> GuestCrashError:
        return GuestCrashError(f"the guest crashed: {reason}\n{self.registers_text()}")

    def _maybe_code(self, image: ContextImage, address: int, length: int) -> bytes | None:
        """Bytes at a linear address, if all of them are mapped."""
        engine = self._engine
        try:
            return b"".join(engine.read(translate(image, engine, address + at, write=False), 1) for at in range(length))
        except LookupError:
            return None
