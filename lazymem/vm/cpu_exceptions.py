"""Delivery of interrupts and exceptions through the guest's IDT in 64-bit mode. Pure but for guest memory.

After Intel's SDM, volume 3, chapter 6 (6.10 and 6.14) and chapter 4 for the page walk. Caveats: accessed and dirty bits
are not set by the walk; task gates, shadow stacks, SMAP and protection keys are not there, nor does CPUID show them.
"""

from __future__ import annotations

import struct
from typing import Protocol

from msgspec import Struct

from lazymem.vm.cpu_context import ContextImage, Segment

DIVIDE_ERROR, DEBUG, BREAKPOINT, INVALID_OPCODE, DOUBLE_FAULT = 0, 1, 3, 6, 8
INVALID_TSS, NOT_PRESENT, STACK_FAULT, GENERAL_PROTECTION, PAGE_FAULT = 10, 11, 12, 13, 14
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_CONTRIBUTORY = frozenset({0, 10, 11, 12, 13})

VECTOR_NAMES = {
    0: "#DE divide error",
    1: "#DB debug",
    3: "#BP breakpoint",
    4: "#OF overflow",
    5: "#BR bound range",
    6: "#UD invalid opcode",
    7: "#NM no FPU",
    8: "#DF double fault",
    10: "#TS invalid TSS",
    11: "#NP segment not present",
    12: "#SS stack fault",
    13: "#GP general protection",
    14: "#PF page fault",
    16: "#MF x87 error",
    17: "#AC alignment",
    19: "#XM SIMD error",
}

FLAG_TF, FLAG_IF, FLAG_NT, FLAG_RF, FLAG_VM = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17
_EXTERNAL = 1
_IN_IDT = 2
_PAGE_PRESENT, _PAGE_WRITE, _PAGE_LARGE = 1, 2, 0x80
_ADDRESS_BITS = 0x000F_FFFF_FFFF_F000


class PhysicalMemory(Protocol):
    """Guest memory by physical address. LookupError where there is none."""

    def read(self, address: int, length: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


class Event(Struct, frozen=True):
    """What is to be delivered. `software`: an INT instruction, whose gate must allow it; `external`: hardware."""

    vector: int
    error_code: int = 0
    software: bool = False
    external: bool = False

    def __str__(self) -> str:
        name = VECTOR_NAMES.get(self.vector) if not (self.software or self.external) else None
        code = f", error code {self.error_code:#x}" if self.vector in _WITH_ERROR_CODE and name else ""
        return f"{name or f'interrupt {self.vector:#x}'}{code}"


class TripleFaultError(Exception):
    """Delivering a double fault failed: a real CPU shuts down. `chain`: what was being delivered, first to last."""

    def __init__(self, chain: list[Event]) -> None:
        super().__init__(" -> ".join(str(event) for event in chain))
        self.chain = chain


class _DeliveryError(Exception):
    """A fault while a fault is delivered."""

    def __init__(self, vector: int, error_code: int) -> None:
        super().__init__(vector, error_code)
        self.event = Event(vector, error_code)


def deliver(image: ContextImage, memory: PhysicalMemory, event: Event, rflags: int) -> None:
    """Make `image` enter the guest's handler for `event`; a fault on the way is delivered instead, as a CPU does.

    `rflags`: the whole register, which the image alone does not have.

    Raises:
        TripleFaultError: not even a double fault could be delivered.
    """
    chain = [event]
    while True:
        try:
            _enter_handler(image, memory, chain[-1], rflags)
        except _DeliveryError as fault:
            if chain[-1].vector == DOUBLE_FAULT and not (chain[-1].software or chain[-1].external):
                raise TripleFaultError([*chain, fault.event]) from None
            chain.append(_combined(chain[-1], fault.event))
        else:
            image.forget_exception()
            return


def _combined(first: Event, second: Event) -> Event:
    """SDM table 6-5: which pairs of faults make a double fault."""
    if first.software or first.external:
        return second
    doubled = (first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY) or (
        first.vector == PAGE_FAULT and second.vector in _CONTRIBUTORY | {PAGE_FAULT}
    )
    return Event(DOUBLE_FAULT) if doubled else second


def _enter_handler(image: ContextImage, memory: PhysicalMemory, event: Event, rflags: int) -> None:
    target, selector, stack_table, trap = _gate(image, memory, event)
    code, level = _handler_segment(image, memory, selector, event)
    old = image.privilege_level
    if stack_table:
        stack = _tss_stack(image, memory, 0x1C + 8 * stack_table)
    elif level < old:
        stack = _tss_stack(image, memory, 4 + 8 * level)
    else:
        stack = image.rsp
    frame = [image.rip, image.segment("cs").selector, rflags, image.rsp, image.segment("ss").selector]
    if event.vector in _WITH_ERROR_CODE and not (event.software or event.external):
        frame.insert(0, event.error_code)
    data = struct.pack(f"<{len(frame)}Q", *frame)
    stack = (stack & ~0xF) - len(data)
    _write_linear(image, memory, stack, data)
    # Nothing of the image changes before this line: a fault above leaves the old state for its own delivery.
    image.rsp = stack
    if level < old:
        image.set_segment("ss", Segment(level, 0, 0, level << 13))
    image.set_segment("cs", code)
    image.enter_64_bit(level)
    cleared = FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | (0 if trap else FLAG_IF)
    image.control_flags &= ~cleared
    image.rip = target


def _gate(image: ContextImage, memory: PhysicalMemory, event: Event) -> tuple[int, int, int, bool]:
    """The IDT entry: handler's address, code selector, interrupt stack (0: none), whether it is a trap gate."""
    idt = image.segment("idt")
    bad = event.vector * 8 + _IN_IDT + (_EXTERNAL if event.external else 0)
    if event.vector * 16 + 15 > idt.limit:
        raise _DeliveryError(GENERAL_PROTECTION, bad)
    low, high = struct.unpack("<QQ", _read_linear(image, memory, idt.base + event.vector * 16, 16))
    kind = low >> 40 & 0x1F
    if kind not in (0xE, 0xF):
        raise _DeliveryError(GENERAL_PROTECTION, bad)
    if event.software and (low >> 45 & 3) < image.privilege_level:
        raise _DeliveryError(GENERAL_PROTECTION, bad)
    if not low >> 47 & 1:
        raise _DeliveryError(NOT_PRESENT, bad)
    target = low & 0xFFFF | (low >> 32 & 0xFFFF_0000) | (high & 0xFFFF_FFFF) << 32
    return target, low >> 16 & 0xFFFF, low >> 32 & 7, kind == 0xF


def _handler_segment(image: ContextImage, memory: PhysicalMemory, selector: int, event: Event) -> tuple[Segment, int]:
    """The handler's 64-bit code segment and the privilege level it runs at."""
    external = _EXTERNAL if event.external else 0
    index = selector & 0xFFF8
    if not index:
        raise _DeliveryError(GENERAL_PROTECTION, external)
    table = image.segment("ldt" if selector & 4 else "gdt")
    if index + 7 > table.limit:
        raise _DeliveryError(GENERAL_PROTECTION, index | external)
    low, high = struct.unpack("<II", _read_linear(image, memory, table.base + index, 8))
    dpl, conforming = high >> 13 & 3, bool(high & 1 << 10)
    is_code = high >> 11 & 3 == 3
    is_64_bit = high >> 21 & 3 == 1
    if not is_code or not is_64_bit or dpl > image.privilege_level:
        raise _DeliveryError(GENERAL_PROTECTION, index | external)
    if not high >> 15 & 1:
        raise _DeliveryError(NOT_PRESENT, index | external)
    level = image.privilege_level if conforming else dpl
    base = (low >> 16) | (high & 0xFF) << 16 | (high & 0xFF00_0000)
    limit = (low & 0xFFFF) | (high & 0xF_0000)
    if high & 1 << 23:
        limit = limit << 12 | 0xFFF
    return Segment(index | level, base, limit, high & 0x00FF_FF00), level


def _tss_stack(image: ContextImage, memory: PhysicalMemory, offset: int) -> int:
    task = image.segment("tr")
    if offset + 7 > task.limit:
        raise _DeliveryError(INVALID_TSS, task.selector & 0xFFFC)
    (stack,) = struct.unpack("<Q", _read_linear(image, memory, task.base + offset, 8))
    if not _canonical(stack):
        raise _DeliveryError(STACK_FAULT, 0)
    return int(stack)


def _canonical(address: int) -> bool:
    return address >> 47 in (0, 0x1FFFF)


def translate(image: ContextImage, memory: PhysicalMemory, address: int, *, write: bool) -> int:
    """The physical address of linear `address` for the supervisor; four levels.

    Raises:
        LookupError: not mapped (or not writable); args hold the page fault's error code.
    """
    table = image.cr(3) & _ADDRESS_BITS
    writable = True
    for shift in (39, 30, 21, 12):
        try:
            (entry,) = struct.unpack("<Q", memory.read(table + (address >> shift & 0x1FF) * 8, 8))
        except LookupError:
            raise LookupError(2 * write) from None
        if not entry & _PAGE_PRESENT:
            raise LookupError(2 * write)
        writable = writable and bool(entry & _PAGE_WRITE)
        if shift == 12 or (entry & _PAGE_LARGE and shift != 39):
            if write and not writable and image.cr(0) & 1 << 16:
                raise LookupError(3)
            offset = (1 << shift) - 1
            return int(entry & _ADDRESS_BITS & ~offset | address & offset)
        table = entry & _ADDRESS_BITS
    raise AssertionError("the walk ends at the last level")


def _pieces(
    image: ContextImage, memory: PhysicalMemory, address: int, length: int, write: bool
) -> list[tuple[int, int]]:
    """(physical address, bytes) for each page of a linear range. A fault sets CR2 and is raised for delivery."""
    address &= (1 << 64) - 1
    if not _canonical(address) or not _canonical(address + length - 1):
        raise _DeliveryError(STACK_FAULT if write else GENERAL_PROTECTION, 0)
    pieces = []
    while length:
        part = min(length, 0x1000 - (address & 0xFFF))
        try:
            pieces.append((translate(image, memory, address, write=write), part))
        except LookupError as fault:
            image.set_cr2(address)
            raise _DeliveryError(PAGE_FAULT, fault.args[0]) from None
        address += part
        length -= part
    return pieces


def _read_linear(image: ContextImage, memory: PhysicalMemory, address: int, length: int) -> bytes:
    pieces = _pieces(image, memory, address, length, False)
    return b"".join(memory.read(at, part) for at, part in pieces)


def _write_linear(image: ContextImage, memory: PhysicalMemory, address: int, data: bytes) -> None:
    at = 0
    for physical, part in _pieces(image, memory, address, len(data), True):
        memory.write(physical, data[at : at + part])
        at += part
