"""The Unicorn engine behind a typed interface; the only module that imports unicorn.

Caveats of the library that shape this module:

- A slice ends by a stop from another thread or by a count of instructions; one engine does one of the two for its whole
  life, because a count is ignored by code that was translated without one.
- A stop is exact only between blocks (`cpu_stops`); a count is exact everywhere, and needs the library's other checks.
- A stop that comes between slices, or while the library restarts after a delivered exception, is lost: ask again.
- `emu_start` and the memory calls release the GIL, so a guest may stand on a page of a mount while other threads run.
- RDTSC, CPUID and the system calls lose their hooks while a stop is pending; only the first hook is safe from that
  (see `_add_hooks`). CPUID's is not: a guest may see the unmasked answer, once in very many.
- An exception must not pass through the library from a hook: it is kept, and raised when `run` ends.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import unicorn
from unicorn import unicorn_const as const
from unicorn import x86_const as x86

from lazymem.errors import EnvironmentRefusedError
from lazymem.vm.cpu_context import ContextImage, ContextShape, shape_from
from lazymem.vm.cpu_stops import maybe_flag_address, set_flag

_unicorn: Any = unicorn  # Type checkers find the binding for Python 2, which is another one.

_EFER = 0xC000_0080
_UNMAPPED = const.UC_HOOK_MEM_READ_UNMAPPED | const.UC_HOOK_MEM_WRITE_UNMAPPED | const.UC_HOOK_MEM_FETCH_UNMAPPED
_ACCESS_NAMES = {const.UC_MEM_READ_UNMAPPED: "read", const.UC_MEM_WRITE_UNMAPPED: "write"}
_CPUID_REGISTERS = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)

Leaf = tuple[int, int, int, int]
"""CPUID's EAX, EBX, ECX, EDX."""


class EngineError(Exception):
    """The library gave up; the text is its reason."""


class MappedRegion(Protocol):
    """Host memory at a physical address; all three multiples of the page size."""

    @property
    def address(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def host_pointer(self) -> int: ...


class Handlers(Protocol):
    """What the engine calls in the middle of a slice, on the thread of `run`."""

    def port_in(self, port: int, size: int) -> int: ...

    def port_out(self, port: int, size: int, value: int) -> None: ...

    def cpuid(self, leaf: int, subleaf: int) -> Leaf: ...

    def time_stamp(self) -> int: ...

    def system_call(self) -> None:
        """SYSCALL or SYSENTER; RIP moves behind it after this returns, so a new RIP would not last."""
        ...

    def exception(self, vector: int) -> None: ...

    def invalid_opcode(self) -> None: ...

    def no_memory(self, kind: str, address: int, size: int) -> None:
        """Has to raise."""
        ...

    def halt_site(self, address: int) -> None:
        """The watched HLT at linear `address` comes next."""
        ...


class Engine:
    """One x86-64 core. Only `stop` may be called from another thread while `run` runs."""

    def __init__(self, regions: Sequence[MappedRegion], handlers: Handlers | None = None) -> None:
        self._uc: Any = _unicorn.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
        self._failure: BaseException | None = None
        self._entered: ContextImage | None = None
        self._counted = False
        for region in regions:
            self._uc.mem_map_ptr(region.address, region.size, const.UC_PROT_ALL, region.host_pointer)
        # Without this, address 0 would be "the end".
        self._uc.ctl_exits_enabled(True)
        check_stops_can_be_exact()
        self._flag_address = maybe_flag_address(_address_of(self._uc))
        if self._flag_address is None:
            raise EngineError("its record does not look like that of the scratch engine")
        self._context = self._uc.context_save()
        self._callbacks: list[object] = []
        if handlers is not None:
            self._handlers = handlers
            self._add_hooks()

    def close(self) -> None:
        """Let go of the memory; nothing else may be called afterwards."""
        for start, end, _ in list(self._uc.mem_regions()):
            self._uc.mem_unmap(start, end - start + 1)

    def run(self, rip: int, count: int) -> bool:
        """Execute from `rip` until a stop, a HLT, an exception, or `count` instructions (0: no count).

        Whether an exception ended it: RIP is at the guest's handler then. With a count it goes on behind one.

        Raises:
            EngineError: the library cannot go on; or whatever a handler raised.
        """
        if not count and self._flag_address is not None:
            set_flag(self._flag_address)
            self._flag_address = None
        self._counted = bool(count)
        try:
            self._uc.emu_start(rip, 0, 0, count)
        except _unicorn.UcError as error:
            if self._failure is None:
                raise EngineError(str(error)) from error
        entered, self._entered = self._entered, None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if entered is not None:
            self.restore(entered)
        return entered is not None

    def stop(self) -> None:
        """End the slice that runs now."""
        self._uc.emu_stop()

    @property
    def rip(self) -> int:
        return int(self._uc.reg_read(x86.UC_X86_REG_RIP))

    @property
    def rflags(self) -> int:
        """The whole register; the context has only part of it."""
        return int(self._uc.reg_read(x86.UC_X86_REG_RFLAGS))

    @property
    def efer(self) -> int:
        return self.msr(_EFER)

    def msr(self, number: int) -> int:
        return int(self._uc.msr_read(number))

    def set_msr(self, number: int, value: int) -> None:
        self._uc.msr_write(number, value)

    def enter_long_mode(self, cr3: int, cr4: int, efer: int, cr0: int) -> None:
        """Set the control registers, in the only order that the library takes, and the units' power-on values."""
        self._uc.reg_write(x86.UC_X86_REG_CR3, cr3)
        self._uc.reg_write(x86.UC_X86_REG_CR4, cr4)
        self.set_msr(_EFER, efer)
        self._uc.reg_write(x86.UC_X86_REG_CR0, cr0)
        # The library's own reset values of these are not the processor's.
        self._uc.reg_write(x86.UC_X86_REG_FPCW, 0x37F)
        self._uc.reg_write(x86.UC_X86_REG_FPTAG, 0xFFFF)
        self._uc.reg_write(x86.UC_X86_REG_MXCSR, 0x1F80)

    def forget_translations(self, cr3: int) -> None:
        """A used engine still translates addresses by old page tables, and runs code that was there before."""
        self._uc.reg_write(x86.UC_X86_REG_CR3, cr3)
        self._uc.ctl_flush_tb()

    def image(self) -> ContextImage:
        """A copy of the registers' inside."""
        self._uc.context_update(self._context)
        shape = context_shape()
        return ContextImage(shape, ctypes.string_at(self._context.context, shape.size))

    def restore(self, image: ContextImage) -> None:
        """Take over a changed image, between slices."""
        ctypes.memmove(self._context.context, bytes(image.data), len(image.data))
        self._uc.context_restore(self._context)

    def enter_handler(self, image: ContextImage) -> None:
        """From `exception` or `invalid_opcode`: go on with this image, at its RIP.

        Behind the slice, unless it is counted: a RIP that is written in the middle of a slice makes the library forget
        to bring RIP up to date at the next stop, and the guest goes on somewhere in its past.
        """
        if self._counted:
            self.restore(image)
            # Only a write of RIP makes the library leave the block that it was in.
            self._uc.reg_write(x86.UC_X86_REG_RIP, image.rip)
            return
        self._entered = image
        self.stop()

    def read(self, address: int, length: int) -> bytes:
        """Physical memory. LookupError where there is none."""
        try:
            return bytes(self._uc.mem_read(address, length))
        except _unicorn.UcError as error:
            raise LookupError(f"{address:#x}") from error

    def write(self, address: int, data: bytes) -> None:
        """Physical memory, through the map and not its file: on a mount each write to the file would be a request."""
        try:
            self._uc.mem_write(address, data)
        except _unicorn.UcError as error:
            raise LookupError(f"{address:#x}") from error

    def watch(self, address: int) -> None:
        """Call `halt_site` before each execution of the instruction at linear `address`."""

        def callback(_uc: object, at: int, _size: int, _data: object) -> None:
            self._guard(lambda: self._handlers.halt_site(at))

        self._uc.hook_add(const.UC_HOOK_CODE, callback, begin=address, end=address)
        # What is translated already has no call of the hook in it.
        self._uc.ctl_flush_tb()

    def _add_hooks(self) -> None:
        add = self._uc.hook_add
        add(const.UC_HOOK_INTR, lambda _uc, vector, _data: self._guard(lambda: self._handlers.exception(vector)))
        add(const.UC_HOOK_INSN_INVALID, self._on_invalid)
        add(_UNMAPPED, self._on_unmapped)
        # While a stop is pending only the first of the hooks on instructions is asked, except by IN and OUT. The
        # others' instructions then execute as the library has them; one such time stamp, the host's, is a jump of
        # minutes.
        self._hook_time_stamp(x86.UC_X86_INS_RDTSC, with_aux=False)
        self._hook_time_stamp(x86.UC_X86_INS_RDTSCP, with_aux=True)
        add(const.UC_HOOK_INSN, self._on_cpuid, aux1=x86.UC_X86_INS_CPUID)
        add(const.UC_HOOK_INSN, self._on_in, aux1=x86.UC_X86_INS_IN)
        add(const.UC_HOOK_INSN, self._on_out, aux1=x86.UC_X86_INS_OUT)
        for instruction in (x86.UC_X86_INS_SYSCALL, x86.UC_X86_INS_SYSENTER):
            add(const.UC_HOOK_INSN, lambda _uc, _data: self._guard(self._handlers.system_call), aux1=instruction)

    def _hook_time_stamp(self, instruction: int, *, with_aux: bool) -> None:
        """The binding's public hook_add does not know these two instructions; the library does."""

        def callback(_engine: int, _data: int) -> int:
            self._guard(lambda: self._put_time_stamp(with_aux))
            return 1

        function = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p)(callback)
        self._callbacks.append(function)
        self._uc._Uc__do_hook_add(const.UC_HOOK_INSN, function, 1, 0, ctypes.c_int(instruction))

    def _put_time_stamp(self, with_aux: bool) -> None:
        ticks = self._handlers.time_stamp()
        self._uc.reg_write(x86.UC_X86_REG_RAX, ticks & 0xFFFF_FFFF)
        self._uc.reg_write(x86.UC_X86_REG_RDX, ticks >> 32 & 0xFFFF_FFFF)
        if with_aux:
            self._uc.reg_write(x86.UC_X86_REG_RCX, 0)

    def _guard(self, handler: Callable[[], None]) -> None:
        try:
            handler()
        except BaseException as error:  # noqa: BLE001 (raised again by run)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self.stop()

    def _on_in(self, _uc: object, port: int, size: int, _data: object) -> int:
        if self._failure is not None:
            return 0
        try:
            return self._handlers.port_in(port, size)
        except BaseException as error:  # noqa: BLE001 (raised again by run)
            self._fail(error)
            return 0

    def _on_out(self, _uc: object, port: int, size: int, value: int, _data: object) -> None:
        # The rest of a block still runs behind a failure; what it does must not reach anybody.
        if self._failure is None:
            self._guard(lambda: self._handlers.port_out(port, size, value))

    def _on_cpuid(self, uc: Any, _data: object) -> int:
        values = self._handlers.cpuid(uc.reg_read(x86.UC_X86_REG_EAX), uc.reg_read(x86.UC_X86_REG_ECX))
        for register, value in zip(_CPUID_REGISTERS, values, strict=True):
            uc.reg_write(register, value)
        return 1

    def _on_invalid(self, _uc: object, _data: object) -> bool:
        self._guard(self._handlers.invalid_opcode)
        return True

    def _on_unmapped(self, _uc: object, access: int, address: int, size: int, _value: int, _data: object) -> bool:
        kind = _ACCESS_NAMES.get(access, "instruction fetch")
        self._guard(lambda: self._handlers.no_memory(kind, address, size))
        return False


def library_version() -> int:
    """Major, minor, patch and build of the library, a byte each."""
    return int(_unicorn.uc_version()[2])


@functools.cache
def context_shape() -> ContextShape:
    """Where this build of the library keeps its registers, found with a fresh engine that is then thrown away.

    Raises:
        EnvironmentRefusedError: this build is laid out otherwise.
    """
    uc: Any = _unicorn.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    magic = 0x1122_3344_5566_7700
    names = ("RAX", "R15", "RIP", "CR2", "DR0")
    values = {name: magic + number for number, name in enumerate(names)}
    for name, value in values.items():
        uc.reg_write(getattr(x86, f"UC_X86_REG_{name}"), value)
    values["IDTR"] = magic + len(names)
    uc.reg_write(x86.UC_X86_REG_IDTR, (0, values["IDTR"], 0x321, 0))
    shape = shape_from(bytes(uc.context_save()), values)
    if shape is None:
        raise EnvironmentRefusedError(
            "this build of the Unicorn library keeps its registers in an unknown order; 2.1.3 and 2.1.4 are known"
        )
    return shape


@functools.cache
def check_stops_can_be_exact() -> None:
    """Show on a scratch engine that a stop in the middle of an instruction does not begin it again.

    Raises:
        EnvironmentRefusedError: this build is laid out otherwise, or does so all the same.
    """
    uc: Any = _unicorn.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    code, data = 0x1000, 0x3000
    uc.mem_map(code, 0x3000)
    # add qword ptr [rdi], 1; inc rax; jmp to the next; hlt
    uc.mem_write(code, bytes.fromhex("4883070148ffc0eb00f4"))
    uc.reg_write(x86.UC_X86_REG_RDI, data)
    address = maybe_flag_address(_address_of(uc))
    if address is not None:
        set_flag(address)
        uc.hook_add(const.UC_HOOK_MEM_WRITE, lambda *_: uc.emu_stop())
        uc.emu_start(code, 0)
        if uc.reg_read(x86.UC_X86_REG_RAX) == 1 and bytes(uc.mem_read(data, 1)) == b"\x01":
            return
    raise EnvironmentRefusedError(
        "this build of the Unicorn library does not let a slice be ended exactly; 2.1.3 and 2.1.4 are known to"
    )


def _address_of(uc: Any) -> int:
    """Of the library's record."""
    handle: Any = uc._uch
    return int(getattr(handle, "value", handle))


def unmasked_cpuid(leaf: int, subleaf: int) -> Leaf:
    """The library's own CPUID, asked of a scratch engine, since a hooked instruction does not execute."""
    uc: Any = _unicorn.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    address, cpuid_instruction = 0x1000, b"\x0f\xa2"
    uc.mem_map(address, 0x1000)
    uc.mem_write(address, cpuid_instruction)
    uc.reg_write(x86.UC_X86_REG_RAX, leaf)
    uc.reg_write(x86.UC_X86_REG_RCX, subleaf)
    uc.emu_start(address, address + len(cpuid_instruction), 0, 1)
    eax, ebx, ecx, edx = (int(uc.reg_read(register)) & 0xFFFF_FFFF for register in _CPUID_REGISTERS)
    return eax, ebx, ecx, edx
