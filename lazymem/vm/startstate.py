"""What a loader (`vm/boot.py`) asks of the CPU: 64-bit mode, paging on, and these registers. Pure."""

from __future__ import annotations

from msgspec import Struct


class StartState(Struct, frozen=True):
    """The first instruction's surroundings.

    The CPU starts in ring 0 with CR0 = PE MP ET NE WP PG, CR4 = PAE OSFXSR OSXMMEXCPT, EFER = SCE LME LMA NXE,
    interrupts off, an empty IDT, the x87 and SSE units at their power-on values and every register not named here 0.
    CS is a flat 64-bit code segment, SS, DS, ES, FS, GS flat data segments, loaded as if from the GDT named here: the
    loader writes its descriptors there (the CPU does not read them at start).
    """

    rip: int
    rsp: int
    cr3: int
    gdt_base: int
    gdt_limit: int
    rsi: int = 0
    rdi: int = 0
    rax: int = 0
    rbx: int = 0
    code_selector: int = 0x10
    data_selector: int = 0x18
