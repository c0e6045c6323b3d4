"""Interrupt delivery as a table: which gate, segment, stack and page makes which fault. No engine, plain memory."""

from __future__ import annotations

import struct

import pytest

from lazymem.vm.cpu_context import ContextImage, ContextShape, Segment
from lazymem.vm.cpu_exceptions import Event, TripleFaultError, deliver, translate

SHAPE = ContextShape(env=40, dr0=1000, size=1200)
IDT, GDT, TSS, STACK, HANDLER = 0x3000, 0x4000, 0x5000, 0x7000, 0x1234_5678_9ABC
CODE_64 = 0x00AF_9B00_0000_FFFF
LONG_MODE = 1 << 14
ERROR_CODE_FRAME_BYTES = 48


class PlainMemory:
    """64 KiB of physical memory."""

    def __init__(self) -> None:
        self.data = bytearray(0x10000)

    def read(self, address: int, length: int) -> bytes:
        if address + length > len(self.data):
            raise LookupError(hex(address))
        return bytes(self.data[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        self.data[address : address + len(data)] = data

    def put(self, address: int, *values: int) -> None:
        self.write(address, struct.pack(f"<{len(values)}Q", *values))

    def frame(self, address: int, words: int) -> tuple[int, ...]:
        return struct.unpack(f"<{words}Q", self.read(address, 8 * words))


def gate(handler: int = HANDLER, selector: int = 0x10, attributes: int = 0x8E, stack: int = 0) -> tuple[int, int]:
    low = handler & 0xFFFF | selector << 16 | stack << 32 | attributes << 40 | (handler >> 16 & 0xFFFF) << 48
    return low, handler >> 32


def machine(level: int = 0) -> tuple[ContextImage, PlainMemory]:
    """Identity-mapped low 64 KiB in 4 KiB pages but for the last page; IDT with a good gate at 6 and 14 and 8."""
    memory, image = PlainMemory(), ContextImage(SHAPE, bytes(SHAPE.size))
    memory.put(0x8000, 0x9003)
    memory.put(0x9000, 0xA003)
    memory.put(0xA000, 0xB003)
    memory.put(0xB000, *[page << 12 | 3 for page in range(15)])
    memory.put(GDT, 0, 0, CODE_64, 0x00CF_9300_0000_FFFF, 0x00AF_FB00_0000_FFFF)
    for vector in (6, 8, 13, 14, 0x20, 0x21):
        memory.put(IDT + 16 * vector, *gate(HANDLER + vector))
    memory.put(TSS + 4, STACK)
    memory.put(TSS + 0x24, 0x6000)
    struct.pack_into("<Q", image.data, SHAPE.env + 424, 0x8001_0033)
    struct.pack_into("<Q", image.data, SHAPE.env + 424 + 24, 0x8000)
    image.set_segment("idt", Segment(0, IDT, 0x21 * 16 + 15, 0))
    image.set_segment("gdt", Segment(0, GDT, 39, 0))
    image.set_segment("tr", Segment(0x28, TSS, 103, 0))
    image.set_segment("cs", Segment(0x23 if level else 0x10, 0, 0, 0))
    image.set_segment("ss", Segment(0x18 | level, 0, 0, 0))
    image.hidden_flags = level | LONG_MODE
    image.rsp, image.rip, image.control_flags = 0x2FFB, 0x1111, 0x302
    return image, memory


def test_frame_on_the_current_stack() -> None:
    image, memory = machine()
    deliver(image, memory, Event(6), 0x347)
    assert image.rsp == 0x2FF0 - 40
    assert memory.frame(image.rsp, 5) == (0x1111, 0x10, 0x347, 0x2FFB, 0x18)
    assert image.rip == HANDLER + 6
    assert image.control_flags == 0x2
    assert not image.interrupts_shadowed


def test_trap_gate_leaves_interrupts_on() -> None:
    image, memory = machine()
    memory.put(IDT + 16 * 6, *gate(attributes=0x8F))
    deliver(image, memory, Event(6), 0x302)
    assert image.control_flags == 0x202


def test_error_code_lies_below_the_frame() -> None:
    image, memory = machine()
    deliver(image, memory, Event(14, 7), 2)
    assert memory.frame(image.rsp, 2) == (7, 0x1111)
    assert image.rsp == 0x2FF0 - ERROR_CODE_FRAME_BYTES


def test_hardware_interrupt_on_an_exceptions_vector_has_no_error_code() -> None:
    image, memory = machine()
    deliver(image, memory, Event(14, external=True), 2)
    assert memory.frame(image.rsp, 1) == (0x1111,)


def test_from_user_mode_the_stack_comes_from_the_task() -> None:
    image, memory = machine(level=3)
    deliver(image, memory, Event(6), 2)
    assert image.privilege_level == 0
    assert image.rsp == STACK - 40
    assert memory.frame(image.rsp, 5) == (0x1111, 0x23, 2, 0x2FFB, 0x1B)
    assert image.segment("ss").selector == 0
    assert image.segment("cs").selector == 0x10


def test_a_handler_of_the_users_own_level_stays_there() -> None:
    image, memory = machine(level=3)
    memory.put(IDT + 16 * 6, *gate(selector=0x20))
    deliver(image, memory, Event(6), 2)
    assert (image.privilege_level, image.segment("cs").selector) == (3, 0x23)
    assert image.rsp == 0x2FF0 - 40
    assert image.segment("ss").selector == 0x1B


def test_interrupt_stack_table() -> None:
    image, memory = machine()
    memory.put(IDT + 16 * 6, *gate(stack=1))
    deliver(image, memory, Event(6), 2)
    assert image.rsp == 0x6000 - 40


def after(fault: int, code: int) -> tuple[int, int]:
    return HANDLER + fault, code


BAD_GATES = {
    "not present": (gate(attributes=0x0E), after(11, 0x20 * 8 + 2)),
    "a task gate": (gate(attributes=0x85), after(13, 0x20 * 8 + 2)),
    "null selector": (gate(selector=0), after(13, 0)),
    "selector beyond the GDT": (gate(selector=0x40), after(13, 0x40)),
    "data selector": (gate(selector=0x18), after(13, 0x18)),
    "less privileged selector": (gate(selector=0x20), after(13, 0x20)),
}


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
@pytest.mark.parametrize("name", BAD_GATES)
def test_bad_gates(name: str, external: bool) -> None:
    entry, (rip, code) = BAD_GATES[name]
    image, memory = machine()
    memory.put(IDT + 16 * 0x20, *entry)
    memory.put(IDT + 16 * 11, *gate(HANDLER + 11))
    deliver(image, memory, Event(0x20, software=not external, external=external), 2)
    assert image.rip == rip
    assert memory.frame(image.rsp, 2) == (code | external, 0x1111)


def test_vector_beyond_the_idt() -> None:
    image, memory = machine()
    deliver(image, memory, Event(0x22, external=True), 2)
    assert memory.frame(image.rsp, 1) == (0x22 * 8 + 3,)


def test_user_may_not_call_a_gate_of_the_kernel() -> None:
    image, memory = machine(level=3)
    deliver(image, memory, Event(0x20, software=True), 2)
    assert image.rip == HANDLER + 13
    assert memory.frame(image.rsp, 1) == (0x20 * 8 + 2,)


def test_unmapped_stack_is_a_page_fault_then_a_double_fault_on_a_good_stack() -> None:
    image, memory = machine()
    image.rsp = 0xFFF0
    memory.put(IDT + 16 * 8, *gate(HANDLER + 8, stack=1))
    deliver(image, memory, Event(6), 2)
    # #UD is benign: the page fault on its way is delivered, fails in the same way, and then it is a double fault.
    assert image.rip == HANDLER + 8
    assert image.cr(2) == 0xFFF0 - ERROR_CODE_FRAME_BYTES
    assert memory.frame(image.rsp, 2) == (0, 0x1111)


def test_failed_double_fault_is_a_triple_fault_and_changes_nothing() -> None:
    image, memory = machine()
    image.rsp = 0xFFF0
    before = bytes(memory.data)
    with pytest.raises(TripleFaultError) as caught:
        deliver(image, memory, Event(14, 2), 2)
    assert [event.vector for event in caught.value.chain] == [14, 8, 14]
    assert (bytes(memory.data), image.rip, image.rsp) == (before, 0x1111, 0xFFF0)


def test_frame_across_two_pages() -> None:
    image, memory = machine()
    image.rsp = 0x2010
    deliver(image, memory, Event(6), 2)
    assert image.rsp == 0x1FE8
    assert memory.frame(0x1FE8, 5) == (0x1111, 0x10, 2, 0x2010, 0x18)


def test_write_protection_holds_for_the_supervisor() -> None:
    image, memory = machine()
    memory.put(0xB000 + 8 * 2, 0x2001)
    assert translate(image, memory, 0x2FF8, write=False) == 0x2FF8
    with pytest.raises(LookupError) as caught:
        translate(image, memory, 0x2FF8, write=True)
    assert caught.value.args == (3,)


@pytest.mark.parametrize("level_bits", [21, 30])
def test_large_pages(level_bits: int) -> None:
    image, memory = machine()
    if level_bits == 30:
        memory.put(0x9000 + 8, 0x4000_0083)
    else:
        memory.put(0xA000 + 8, 0x4000_0083)
    address = (1 << level_bits) + 0x12345
    assert translate(image, memory, address, write=True) == 0x4001_2345


def test_non_canonical_idt_is_a_general_protection_fault_and_ends() -> None:
    image, memory = machine()
    image.set_segment("idt", Segment(0, 0x1234_0000_0000_0000, 0xFFF, 0))
    with pytest.raises(TripleFaultError, match=r"#GP.*-> #DF"):
        deliver(image, memory, Event(13), 2)
