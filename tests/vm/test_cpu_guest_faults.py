"""Exceptions reach the guest's own handlers with RIP, error code, CR2, flags and privilege level right."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazymem.errors import GuestCrashError
from lazymem.vm.machine import Ending, MachineConfig
from tests.support.machines import MIB, Rig, assemble

PASSED = 0x10 << 1 | 1

FAULT_AND_SKIP = """
_start:
    gate {vector}, handler
    load_idt
    lea here(%rip), %r15
    mov $1, %eax
    xor %edx, %edx
    xor %ecx, %ecx
    stc
    std
here:
    {instruction}
    jnc bad
    pushfq
    testl $0x400, (%rsp)
    jz bad
    cmp $0x1234, %rbx
    jne bad
    finish PASS
bad:
    finish FAIL
handler:
    cmp (%rsp), %r15
    jne bad
    testl $1, 16(%rsp)
    jz bad
    testl $0x400, 16(%rsp)
    jz bad
    mov $0x1234, %rbx
    clc
    addq ${length}, (%rsp)
    iretq
"""

SOFTWARE_INTERRUPTS = """
_start:
    gate 0x80, handler
    gate 3, handler
    load_idt
    xor %ebx, %ebx
    lea after(%rip), %r15
    int $0x80
after:
    lea after_breakpoint(%rip), %r15
    int3
after_breakpoint:
    cmp $2, %ebx
    jne bad
    finish PASS
bad:
    finish FAIL
handler:
    cmp (%rsp), %r15
    jne bad
    inc %ebx
    iretq
"""

DEMAND_PAGING = """
_start:
    gate 14, handler
    load_idt
    mov $0x8000000000, %rdi
    movq $0x55, (%rdi)
    cmpq $0x55, (%rdi)
    jne bad
    mov $0x8000200000, %rdi
    mov (%rdi), %rax
    cmp $0x55, %rax
    jne bad
    cmp $2, %rbx
    jne bad
    finish PASS
bad:
    finish FAIL
handler:
    inc %ebx
    mov %cr2, %rax
    cmp %rax, %rdi
    jne bad
    mov %cr3, %rsi
    lea pointers(%rip), %rcx
    mov %rcx, %rdx
    or $3, %rdx
    mov %rdx, 8(%rsi)
    lea directory(%rip), %rdx
    or $3, %rdx
    mov %rdx, (%rcx)
    cmp $1, %ebx
    jne second
    cmpq $2, (%rsp)
    jne bad
    movq $0x200083, directory(%rip)
    add $8, %rsp
    iretq
second:
    cmpq $0, (%rsp)
    jne bad
    movq $0x200083, directory + 8(%rip)
    add $8, %rsp
    iretq
    .data
    .balign 4096
pointers: .fill 4096, 1, 0
directory: .fill 4096, 1, 0
"""

PROTECTION_FAULTS = """
_start:
    gate 13, handler
    load_idt
    mov $0x1234000000000000, %rdi
    lea codes(%rip), %r14
    mov (%rdi), %rax
    mov $0x777, %ax
    mov %ax, %ds
    int $0x30
    cmp $3, %ebx
    jne bad
    finish PASS
bad:
    finish FAIL
handler:
    mov %ebx, %ecx
    inc %ebx
    pop %rax
    cmp (%r14, %rcx, 8), %rax
    jne bad
    lea lengths(%rip), %rdx
    mov (%rdx, %rcx, 8), %rax
    add %rax, (%rsp)
    iretq
    .data
codes: .quad 0, 0x774, 0x30 * 8 + 2
lengths: .quad 3, 2, 2
"""

DOUBLE_FAULT = """
_start:
    gate 8, handler, 0, 1
    load_idt
    call set_task
    ud2
    finish FAIL
handler:
    cmpq $0, (%rsp)
    jne bad
    lea stack_top - 48(%rip), %rax
    cmp %rax, %rsp
    jne bad
    finish PASS
bad:
    finish FAIL
"""

USER_MODE = """
_start:
    gate 0x80, service, 3
    gate 13, protection
    gate 0x20, tick
    load_idt
    call set_task
    # The pages of the identity map are the supervisor's: let the user in.
    mov %cr3, %rsi
    orq $4, (%rsi)
    mov (%rsi), %rdi
    and $-4096, %rdi
    orq $4, (%rdi)
    mov (%rdi), %rdi
    and $-4096, %rdi
    orq $4, (%rdi)
    orq $4, 8(%rdi)
    mov %cr3, %rax
    mov %rax, %cr3
    start_timer 1193
    xor %ebx, %ebx
    pushq $0x2b
    lea user_top(%rip), %rax
    push %rax
    pushq $0x202
    pushq $0x33
    lea user(%rip), %rax
    push %rax
    iretq
bad:
    finish FAIL
service:
    lea stack_top - 40(%rip), %rax
    cmp %rax, %rsp
    jne bad
    cmpq $0x33, 8(%rsp)
    jne bad
    cmpq $0x2b, 32(%rsp)
    jne bad
    mov %cs, %ax
    test $3, %ax
    jnz bad
    inc %ebx
    cmp $3, %ebx
    jne again
    finish PASS
again:
    iretq
protection:
    # HLT in ring 3
    cmp $1, %ebx
    jne bad
    inc %ebx
    add $8, %rsp
    addq $1, (%rsp)
    iretq
tick:
    incq ticks(%rip)
    end_of_interrupt
    iretq
user:
    mov %cs, %ax
    and $3, %ax
    cmp $3, %ax
    jne bad
    int $0x80
    hlt
1:  cmpq $5, ticks(%rip)
    jb 1b
    int $0x80
    jmp bad
    .data
    .balign 16
    .fill 4096, 1, 0
user_top:
ticks: .quad 0
"""

SET_TASK = """
    .text
set_task:
    lea task(%rip), %rax
    mov %ax, descriptors + 0x3a(%rip)
    shr $16, %rax
    mov %al, descriptors + 0x3c(%rip)
    mov %ah, descriptors + 0x3f(%rip)
    lgdt descriptors_pointer(%rip)
    mov $0x38, %ax
    ltr %ax
    lea stack_top(%rip), %rax
    mov %rax, task + 4(%rip)
    mov %rax, task + 0x24(%rip)
    ret
    .data
    .balign 16
descriptors:
    .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff
    .quad 0, 0x00cff3000000ffff, 0x00affb000000ffff
    .quad 0x0000890000000067, 0
descriptors_pointer:
    .word 71
    .quad descriptors
    .balign 16
task: .fill 104, 1, 0
    .balign 16
    .fill 4096, 1, 0
stack_top:
"""

GUESTS = {
    "divide error": FAULT_AND_SKIP.format(vector=0, instruction="div %ecx", length=2),
    "invalid opcode": FAULT_AND_SKIP.format(vector=6, instruction="ud2", length=2),
    "system call is refused": FAULT_AND_SKIP.format(vector=6, instruction="syscall", length=2),
    "fast system call is refused": FAULT_AND_SKIP.format(vector=6, instruction="sysenter", length=2),
    "software interrupts": SOFTWARE_INTERRUPTS,
    "demand paging": DEMAND_PAGING,
    "protection faults": PROTECTION_FAULTS,
    "double fault on its own stack": DOUBLE_FAULT + SET_TASK,
    "user mode and back": USER_MODE + SET_TASK,
}


def run(source: str, folder: Path, icount: bool) -> Ending:
    config = MachineConfig(4 * MIB, assemble(source, folder), icount=icount, icount_sleep=False)
    with Rig(config) as rig:
        return rig.boot().ended()


@pytest.mark.parametrize("icount", [False, True], ids=["wall", "icount"])
@pytest.mark.parametrize("name", GUESTS)
def test_guest_handles_its_own_faults(name: str, icount: bool, tmp_path: Path) -> None:
    ending = run(GUESTS[name], tmp_path, icount)
    assert ending == Ending("shutdown", PASSED, "debug exit with 0x10")


CRASHES = {
    "triple fault": ("ud2", "triple fault: #UD invalid opcode -> #GP general protection, error code 0x32 -> #DF"),
    "read of nothing": ("mov $0xd0000000, %edi\n mov (%rdi), %eax", "read of 4 bytes at physical address 0xd0000000"),
    "write to nothing": ("mov $0xd0000000, %edi\n mov %al, (%rdi)", "write of 1 bytes at physical address 0xd0000000"),
    "run into nothing": ("mov $0xd0000000, %edi\n jmp *%rdi", "instruction fetch of 1 bytes at physical address 0xd00"),
    "page tables in nothing": ("mov $0xd0000000, %eax\n mov %rax, %cr3\n nop", "triple fault: #PF page fault"),
    "out of long mode": (
        "mov %cr0, %rax\n btr $31, %rax\n mov %rax, %cr0\n ud2",
        "#UD invalid opcode outside of 64-bit mode",
    ),
    "no stack": ("gate 6, _start\n load_idt\n mov $0xd0000100, %esp\n ud2", "the stack for #UD invalid opcode is at"),
}


@pytest.mark.parametrize("icount", [False, True], ids=["wall", "icount"])
@pytest.mark.parametrize("name", CRASHES)
def test_abnormal_end_tells_the_state(name: str, icount: bool, tmp_path: Path) -> None:
    code, reason = CRASHES[name]
    ending = run(f"_start:\n mov $0x1122334455667788, %rbp\n {code}\n finish FAIL", tmp_path, icount)
    assert isinstance(ending.error, GuestCrashError)
    assert (ending.run_state, ending.exit_code) == ("guest-panicked", GuestCrashError.exit_code)
    assert reason in ending.reason
    assert "rbp=1122334455667788" in ending.reason
    assert "rip=000000000010" in ending.reason or "rip=00000000d0000000" in ending.reason


def test_fault_in_the_handler_of_a_fault_is_a_new_fault(tmp_path: Path) -> None:
    """A library that is not told that a fault was delivered takes the next one for a double fault."""
    source = """
_start:
    gate 6, outer
    gate 14, inner
    load_idt
    ud2
    finish FAIL
outer:
    mov $0x8000000000, %rdi
    mov (%rdi), %rax
    finish FAIL
inner:
    cmpq $0, (%rsp)
    jne bad
    finish PASS
bad:
    finish FAIL
"""
    assert run(source, tmp_path, icount=True).exit_code == PASSED
