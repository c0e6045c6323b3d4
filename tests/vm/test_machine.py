"""A whole guest from outside: ticks, idling, input, stop and start, endings; by the wall clock and counted."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lazymem.errors import LazymemError, UsageError
from lazymem.vm.cpu_identity import cpuid
from lazymem.vm.machine import Machine, MachineConfig
from tests.support.machines import MIB, Rig, assemble
from tests.support.stalledpages import StalledPages

PASSED = 0x10 << 1 | 1

both_ways = pytest.mark.parametrize("icount", [False, True], ids=["wall", "icount"])


def rig_for(source: str, folder: Path, *, icount: bool, icount_sleep: bool = False) -> Rig:
    kernel = assemble(source, folder)
    return Rig(MachineConfig(4 * MIB, kernel, icount=icount, icount_sleep=icount_sleep))


TICKS = """
_start:
    gate 0x20, tick
    load_idt
    start_timer {divisor}
    sti
again:
    {idle}
    cmpq ${ticks}, ticks(%rip)
    jb again
    finish PASS
tick:
    incq ticks(%rip)
    end_of_interrupt
    iretq
    .data
ticks: .quad 0
"""


@both_ways
@pytest.mark.parametrize("idle", ["hlt", "nop"], ids=["halted", "busy"])
def test_timer_ticks_arrive(idle: str, icount: bool, tmp_path: Path) -> None:
    with rig_for(TICKS.format(divisor=1193, idle=idle, ticks=100), tmp_path, icount=icount) as rig:
        assert rig.boot().ended().exit_code == PASSED


def test_a_halted_guest_costs_the_host_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread sleeps in one wait a tick, and does not run the CPU meanwhile. (A busy one runs a slice after the
    other, for milliseconds each.)"""
    ticks, slices, waits = 6, 0, 0
    with rig_for(TICKS.format(divisor=0, idle="hlt", ticks=ticks), tmp_path, icount=False) as rig:
        run, wait = rig.machine.cpu.run, rig.machine._wait_event

        def counted_run(count: int, *, wakes: bool) -> None:
            nonlocal slices
            slices += 1
            run(count, wakes=wakes)

        def counted_wait(timeout_ns: int | None) -> bool:
            nonlocal waits
            waits += 1
            return wait(timeout_ns)

        monkeypatch.setattr(rig.machine.cpu, "run", counted_run)
        monkeypatch.setattr(rig.machine, "_wait_event", counted_wait)
        assert rig.boot().ended().exit_code == PASSED
    assert 1 <= waits <= 2 * ticks, "ticks that came while it was busy are waited for by nobody"
    assert slices <= 4 * ticks


def test_counted_time_that_idles_can_pass_on_the_host_too(tmp_path: Path) -> None:
    with rig_for(TICKS.format(divisor=0, idle="hlt", ticks=4), tmp_path, icount=True, icount_sleep=True) as rig:
        started = time.monotonic()
        assert rig.boot().ended().exit_code == PASSED
        assert time.monotonic() - started > 0.15


ONE_SHOTS = """
    # Arms the timer for ever longer moments and waits for each with STI, HLT. An interrupt between the two would leave
    # the HLT without anything that ends it.
_start:
    gate 0x20, tick
    load_idt
    start_timer 0
    xor %r13d, %r13d
    xor %r12d, %r12d
again:
    cli
    outb 0x43, 0x30
    mov %r13d, %eax
    add $1, %eax
    out %al, $0x40
    mov %ah, %al
    out %al, $0x40
    sti
    hlt
    inc %r13d
    cmp $400, %r13d
    jne again
    cmp $400, %r12d
    jb bad
    finish PASS
bad:
    finish FAIL
tick:
    inc %r12d
    end_of_interrupt
    iretq
"""


@both_ways
def test_no_interrupt_comes_between_sti_and_hlt(icount: bool, tmp_path: Path) -> None:
    with rig_for(ONE_SHOTS, tmp_path, icount=icount) as rig:
        assert rig.boot().ended().exit_code == PASSED


ECHO = """
    # Sends back what comes, by interrupts, without any timer. Ends at 'q'.
_start:
    gate 0x24, received
    load_idt
    start_timer 0
    outb 0x43, 0x3a
    outb 0x21, 0xef
    outb 0x3fa, 0x01
    outb 0x3f9, 0x01
    outb 0x3fc, 0x08
    sti
    mov $'>', %al
    mov $0x3f8, %dx
    out %al, %dx
again:
    hlt
    jmp again
received:
    mov $0x3fd, %dx
    in %dx, %al
    test $1, %al
    jz done
    mov $0x3f8, %dx
    in %dx, %al
    out %al, %dx
    cmp $'q', %al
    jne received
    finish PASS
done:
    end_of_interrupt
    iretq
"""


@both_ways
def test_input_wakes_a_halted_guest(icount: bool, tmp_path: Path) -> None:
    with rig_for(ECHO, tmp_path, icount=icount) as rig:
        rig.boot().line.wait_for(lambda sent: sent == b">")
        for word in (b"a", b"hello, world: longer than a FIFO of 16 bytes", b"b"):
            expected = rig.line.sent + word
            rig.line.type(word)
            rig.line.wait_for(expected.__eq__)
        rig.line.type(b"q")
        assert rig.ended().exit_code == PASSED


SELF_RAISED = """
    # Enables the transmitter's interrupt while the transmitter is empty, which raises it, and counts until it comes.
_start:
    gate 0x24, sent
    load_idt
    start_timer 0
    outb 0x43, 0x3a
    outb 0x21, 0xef
    outb 0x3fc, 0x08
    xor %ecx, %ecx
    sti
    outb 0x3f9, 0x02
again:
    inc %ecx
    cmp $5000, %ecx
    jne again
    finish FAIL
sent:
    finish PASS
"""


def test_an_interrupt_that_the_guest_itself_raises_comes_at_once(tmp_path: Path) -> None:
    with rig_for(SELF_RAISED, tmp_path, icount=True) as rig:
        assert rig.boot().ended().exit_code == PASSED


def test_what_is_typed_while_the_guest_stands_arrives_later(tmp_path: Path) -> None:
    with rig_for(ECHO, tmp_path, icount=False) as rig:
        rig.boot().line.wait_for(lambda sent: sent == b">")
        assert rig.machine.stop(60)
        rig.line.type(b"later")
        assert rig.line.sent == b">"
        rig.machine.start()
        rig.line.wait_for(lambda sent: sent == b">later")


def let_step(machine: Machine) -> None:
    """Return after the guest has run, or waited, for at least one slice."""
    for _ in range(2):
        passed = threading.Event()
        machine.post(passed.set)
        assert passed.wait(60)


SILENT_ENDS = {
    "interrupts off": ("cli\n hlt\n finish FAIL", True),
    "interrupts off, in a loop": ("cli\n2: hlt\n jmp 2b", True),
    "interrupts on, no timer": ("sti\n2: hlt\n jmp 2b", True),
    "busy for ever": ("2: jmp 2b", False),
}


def test_a_stop_behind_a_start_returns_at_once(tmp_path: Path) -> None:
    with rig_for("_start: jmp _start", tmp_path, icount=False) as rig:
        rig.boot()
        for _ in range(300):
            assert rig.machine.stop(60)
            rig.machine.start()


@both_ways
@pytest.mark.parametrize("name", SILENT_ENDS)
def test_stop_and_start_of_a_guest_that_waits(name: str, icount: bool, tmp_path: Path) -> None:
    code, halts = SILENT_ENDS[name]
    with rig_for(f"_start:\n mov $0x3f8, %dx\n mov $'x', %al\n out %al, %dx\n {code}", tmp_path, icount=icount) as rig:
        machine = rig.machine
        assert machine.run_state == "prelaunch"
        rig.boot().line.wait_for(lambda sent: sent == b"x")
        for _ in range(50):
            assert machine.run_state == "running"
            let_step(machine)
            assert machine.stop(60)
            assert machine.run_state == "paused"
            if machine.cpu.halted == halts:
                break
            # The guest had not yet come to its HLT.
            machine.start()
        assert machine.cpu.halted == halts
        assert machine.ending is None
        machine.start()
        let_step(machine)
        assert machine.stop(60)
        assert machine.cpu.halted == halts


def test_virtual_time_stands_while_the_guest_stands(tmp_path: Path) -> None:
    with rig_for("_start: jmp _start", tmp_path, icount=False) as rig:
        rig.boot()
        assert rig.machine.stop(60)
        first = rig.save()
        assert rig.save() == first


def test_start_takes_back_a_stop(tmp_path: Path) -> None:
    with rig_for(TICKS.format(divisor=1193, idle="hlt", ticks=200), tmp_path, icount=False) as rig:
        rig.boot()
        for _ in range(200):
            rig.machine.request_stop()
            rig.machine.start()
        assert rig.machine.run_state in ("running", "shutdown")
        assert rig.ended().exit_code == PASSED


TOUCH = """
_start:
    mov $0x300000, %edi
    mov $0x3f8, %dx
    mov $'x', %al
    out %al, %dx
    mov (%rdi), %rax
    finish PASS
"""


@both_ways
def test_everything_answers_while_the_guest_waits_for_a_page(icount: bool, tmp_path: Path) -> None:
    with rig_for(TOUCH, tmp_path, icount=icount) as rig:
        machine = rig.machine
        machine.boot()
        with StalledPages(rig.blocks["pc.ram"].address + 0x300000, 1) as pages:
            machine.start()
            pages.wait_touched()
            assert machine.run_state == "running"
            assert machine.stop(0.05) is False
            assert machine.run_state == "running"
            stopped = threading.Event()
            waiter = threading.Thread(target=lambda: stopped.set() if machine.stop() else None)
            waiter.start()
            assert not stopped.wait(0.05)
            pages.release()
            assert stopped.wait(60)
            waiter.join()
            assert machine.run_state in ("paused", "shutdown")
            machine.start()
            assert rig.ended().exit_code == PASSED


def test_close_does_not_wait_for_a_page_for_ever(tmp_path: Path) -> None:
    with rig_for(TOUCH, tmp_path, icount=False) as rig:
        rig.machine.boot()
        with StalledPages(rig.blocks["pc.ram"].address + 0x300000, 1) as pages:
            rig.machine.start()
            pages.wait_touched()
            assert rig.machine.close(0.05) is False
            pages.release()


ENDINGS = {
    "debug exit 0": ("xor %eax, %eax\n out %al, $0xf4", ("shutdown", 1, "debug exit with 0x0")),
    "debug exit, then more": (
        "mov $1, %eax\n out %al, $0xf4\n outb 0x64, 0xfe",
        ("shutdown", 3, "debug exit with 0x1"),
    ),
    "debug exit 0x7f": ("mov $0x7f, %eax\n out %eax, $0xf4", ("shutdown", 0xFF, "debug exit with 0x7f")),
    "keyboard controller": ("outb 0x64, 0xfe", ("shutdown", 0, "reset")),
    "reset control": ("outb 0xcf9, 0x06", ("shutdown", 0, "reset")),
}


@both_ways
@pytest.mark.parametrize("name", ENDINGS)
def test_the_guests_ways_to_end(name: str, icount: bool, tmp_path: Path) -> None:
    code, expected = ENDINGS[name]
    with rig_for(f"_start:\n {code}\n2: jmp 2b", tmp_path, icount=icount) as rig:
        heard: list[str] = []
        rig.machine.listen_ended(lambda ending: heard.append(ending.reason))
        ending = rig.boot().ended()
        assert (ending.run_state, ending.exit_code, ending.reason) == expected
        assert ending.error is None
        assert rig.machine.stop(60), "an ended guest stands"
        rig.machine.start()
        assert rig.machine.run_state == "shutdown"
        rig.machine.listen_ended(lambda ending: heard.append(ending.run_state))
        assert heard == [expected[2], "shutdown"]


class BrokenDevice:
    def read(self, offset: int, size: int) -> int:
        raise KeyError("no such register")

    def write(self, offset: int, size: int, value: int) -> None:
        raise ValueError("refuses")


@pytest.mark.parametrize(("code", "text"), [("in %dx, %al", "no such register"), ("out %al, %dx", "refuses")])
def test_a_bug_in_a_device_ends_the_guest_and_is_told(code: str, text: str, tmp_path: Path) -> None:
    with rig_for(f"_start:\n mov $0x500, %dx\n {code}\n finish PASS", tmp_path, icount=False) as rig:
        rig.machine.board.bus.map_ports(0x500, 1, BrokenDevice())
        ending = rig.boot().ended()
        assert ending.run_state == "internal-error"
        assert isinstance(ending.error, LazymemError)
        assert text in ending.reason


NOT_HALTS = """
    # Instructions that end in the byte of HLT, and jumps to behind one.
_start:
    {flags}
    mov $0x8000, %esi
    mov $300000, %ecx
    jmp behind
    hlt
behind:
    mov %rsi, %rsp
    mov %esi, %esp
    cmp $0xf4, %al
    dec %ecx
    jnz behind
    finish PASS
"""


@both_ways
@pytest.mark.parametrize("flags", ["cli", "sti"])
def test_bytes_like_hlt_are_not_taken_for_it(flags: str, icount: bool, tmp_path: Path) -> None:
    with rig_for(NOT_HALTS.format(flags=flags), tmp_path, icount=icount) as rig:
        assert rig.boot().ended().exit_code == PASSED


MASKED_TIMER = """
    # Each slice that ends behind the inner loop ends behind a byte of HLT, a jump's distance, while a timer runs.
_start:
    start_timer 1193
    outb 0x21, 0xff
    sti
    mov $3000000, %ebx
outer:
    mov $3, %ecx
inner:
    .fill 8, 1, 0x90
    dec %ecx
    jnz inner
    dec %ebx
    jnz outer
    finish PASS
"""


@both_ways
def test_a_timer_that_is_masked_does_not_hang_a_guest_that_seems_to_halt(icount: bool, tmp_path: Path) -> None:
    with rig_for(MASKED_TIMER, tmp_path, icount=icount) as rig:
        assert rig.boot().ended().exit_code == PASSED


def test_stop_while_bytes_look_like_hlt(tmp_path: Path) -> None:
    with rig_for(NOT_HALTS.format(flags="sti").replace("300000", "3000000"), tmp_path, icount=False) as rig:
        rig.boot()
        for _ in range(30):
            assert rig.machine.stop(60)
            if rig.machine.ending is None:
                assert not rig.machine.cpu.halted
            rig.machine.start()
        assert rig.ended().exit_code == PASSED


def test_cpuid_hides_what_does_not_work() -> None:
    _, _, ecx, edx = cpuid(1, 0)
    hidden = {"monitor": 3, "fma": 12, "x2apic": 21, "xsave": 26, "osxsave": 27, "avx": 28, "f16c": 29, "rdrand": 30}
    assert [name for name, bit in hidden.items() if ecx >> bit & 1] == []
    assert not edx >> 9 & 1, "there is no local APIC"
    assert not edx >> 11 & 1, "SYSENTER does nothing"
    assert not cpuid(0x8000_0001, 0)[3] >> 11 & 1, "SYSCALL does nothing"
    assert cpuid(0x8000_0001, 0)[3] >> 29 & 1, "long mode"


def test_a_guest_sees_the_masked_cpuid_and_virtual_time(tmp_path: Path) -> None:
    source = """
_start:
    mov $1, %eax
    xor %ecx, %ecx
    cpuid
    mov %rcx, 0x300000
    mov %rdx, 0x300008
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, 0x300010
    rdtscp
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, 0x300018
    finish PASS
"""
    with rig_for(source, tmp_path, icount=True) as rig:
        assert rig.boot().ended().exit_code == PASSED
        data = rig.blocks["pc.ram"].read(0x300000, 32)
        words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, 32, 8)]
        assert tuple(words[:2]) == cpuid(1, 0)[2:]
        assert 0 < words[2] < words[3] < 1_000_000, "nanoseconds since the start"


def test_ram_beyond_the_hole_below_4_gib(tmp_path: Path) -> None:
    source = """
_start:
    mov $0x100001000, %rdi
    movq $0x5a, (%rdi)
    mov $0xbffffff8, %edi
    movq $0x5b, (%rdi)
    mov $0xc0000000, %edi
    mov (%rdi), %rax
    finish PASS
"""
    with Rig(MachineConfig(5 << 30, assemble(source, tmp_path))) as rig:
        ending = rig.boot().ended()
        assert "read of 8 bytes at physical address 0xc0000000" in ending.reason
        ram = rig.blocks["pc.ram"]
        assert ram.read((3 << 30) + 0x1000, 1) == b"\x5a"
        assert ram.read((3 << 30) - 8, 1) == b"\x5b"


@pytest.mark.parametrize("size", [0, 4096, 2 * MIB + 1, 2 * MIB - 4096, 1 << 40, 60 << 40, 10**30])
def test_ram_of_a_senseless_size_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"RAM of {size} bytes"):
        MachineConfig(size)


def test_nothing_to_run_is_refused() -> None:
    with Rig(MachineConfig(2 * MIB)) as rig, pytest.raises(UsageError, match="name a kernel"):
        rig.machine.boot()


def test_closing_twice_and_unstarted_is_harmless() -> None:
    with Rig(MachineConfig(2 * MIB)) as rig:
        machine: Machine = rig.machine
        assert machine.close()
        machine.start()
        assert machine.run_state == "prelaunch"
