"""A stop from another thread is exact: no instruction is executed twice, wherever it comes."""

import ctypes
import struct
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest

from lazymem.errors import EnvironmentRefusedError
from lazymem.vm import cpu_engine, cpu_stops
from lazymem.vm.cpu_engine import Engine
from lazymem.vm.machine import MachineConfig
from tests.support.machines import MIB, Rig, assemble

CODE, DATA = 0x1000, 0x3000
SLICES = 2000

# add qword ptr [rdi], 1; inc rcx; add qword ptr [rdi+8], 1; inc rdx; jmp to the start
LOOP = bytes.fromhex("4883070148ffc1488347080148ffc2ebf0")


class Region:
    """16 KiB of host memory at physical address 0."""

    address, size = 0, 0x4000

    def __init__(self) -> None:
        self.memory = (ctypes.c_char * (self.size + 4096))()
        self.host_pointer = (ctypes.addressof(self.memory) + 4095) & ~4095

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(self.host_pointer + at, data, len(data))

    def read(self, at: int, length: int) -> bytes:
        return ctypes.string_at(self.host_pointer + at, length)


def test_no_instruction_is_executed_twice() -> None:
    """With the library as it comes, one in two of these slices adds once too often."""
    region = Region()
    region.write(CODE, LOOP)
    engine = Engine([region])
    image = engine.image()
    image.set_gpr(1, 0)
    image.set_gpr(2, 0)
    image.set_gpr(7, DATA)
    image.rip = CODE
    engine.restore(image)
    running, over = threading.Event(), threading.Event()

    def stop_again_and_again() -> None:
        while not over.is_set():
            time.sleep(0.0001)  # the library runs meanwhile: this is what is tested, not waited for
            if running.is_set():
                engine.stop()

    stopper = threading.Thread(target=stop_again_and_again)
    stopper.start()
    try:
        running.set()
        for _ in range(SLICES):
            engine.run(engine.rip, 0)
    finally:
        over.set()
        stopper.join()
    image = engine.image()
    first, second = struct.unpack("<QQ", region.read(DATA, 16))
    # A slice may end between an addition and the count of it only if a block does, and none does.
    assert (first, second) == (image.gpr(1), image.gpr(2))
    assert first > SLICES
    engine.close()


class StopsAtPorts:
    """A device that has the slice ended while the guest speaks to it, as another thread may."""

    engine: Engine

    def port_out(self, port: int, size: int, value: int) -> None:
        self.engine.stop()

    def time_stamp(self) -> int:
        return 0x0123_4567_89AB_CDEF

    def refuse(self, *values: object) -> NoReturn:
        raise AssertionError(values)

    port_in = cpuid = system_call = exception = invalid_opcode = no_memory = halt_site = refuse


def test_time_is_the_machines_also_while_a_stop_is_pending() -> None:
    """With the hook behind others the library read the host's time there: a jump of minutes."""
    region, handlers = Region(), StopsAtPorts()
    region.write(CODE, bytes.fromhex("e680 0f31 f4"))  # out %al, $0x80; rdtsc; hlt
    handlers.engine = engine = Engine([region], handlers)
    image = engine.image()
    image.rip = CODE
    engine.restore(image)
    engine.run(CODE, 0)
    image = engine.image()
    assert (image.gpr(2), image.gpr(0)) == (0x0123_4567, 0x89AB_CDEF)
    engine.close()


def test_a_library_that_is_laid_out_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_engine.check_stops_can_be_exact()
    check = cpu_engine.check_stops_can_be_exact.__wrapped__
    monkeypatch.setattr(cpu_engine, "maybe_flag_address", lambda _engine: None)
    with pytest.raises(EnvironmentRefusedError, match=r"does not let a slice be ended exactly"):
        check()
    # The check is one that can fail: another byte of the record does not do it.
    spare = ctypes.create_string_buffer(1)
    monkeypatch.setattr(cpu_engine, "maybe_flag_address", lambda _engine: ctypes.addressof(spare))
    with pytest.raises(EnvironmentRefusedError):
        check()


def test_the_flag_is_looked_for_by_its_neighbours() -> None:
    sizes = struct.pack("<IIQQ", 4096, 4095, 4096, 4096)
    good = bytes(100) + sizes + bytes(24) + bytes((0, 0, 0, 1))
    for record, offset in (
        (good, 100 + 24 + 24 + 2),
        (good[:-4] + bytes((0, 0, 1, 1)), None),
        (good + sizes, None),
        (bytes(200), None),
    ):
        buffer = ctypes.create_string_buffer(record, 8192)
        address = ctypes.addressof(buffer)
        assert cpu_stops.maybe_flag_address(address) == (None if offset is None else address + offset)


EXCEPTIONS = 20_000
GUEST = """
    .bss
counts: .skip 16
    .text
_start:
    lea stack_top(%rip), %rsp
    gate 6, over
    load_idt
    xor %r12d, %r12d
1:  ud2
    incq counts+8(%rip)
    inc %r12d
    cmp $EXCEPTIONS, %r12d
    jb 1b
    cmpq $EXCEPTIONS, counts(%rip)
    jne 2f
    cmpq $EXCEPTIONS, counts+8(%rip)
    jne 2f
    finish PASS
2:  finish FAIL
over:
    incq counts(%rip)
    addq $2, (%rsp)
    iretq
    .bss
    .skip 4096
stack_top:
""".replace("$EXCEPTIONS", f"${EXCEPTIONS}")


def test_stops_among_exceptions_are_exact(tmp_path: Path) -> None:
    """A RIP written in the middle of a slice made the next stop lose the guest's place."""
    stopped = threading.Event()
    with Rig(MachineConfig(2 * MIB, kernel=assemble(GUEST, tmp_path))) as rig:
        rig.machine.boot()

        def stop_again_and_again() -> None:
            while not stopped.is_set():
                time.sleep(0.0001)  # the guest runs meanwhile: this is what is tested, not waited for
                rig.machine.cpu.interrupt_slice()

        stopper = threading.Thread(target=stop_again_and_again)
        stopper.start()
        try:
            rig.machine.start()
            ending = rig.ended()
        finally:
            stopped.set()
            stopper.join()
    assert ending.exit_code == 0x10 << 1 | 1
