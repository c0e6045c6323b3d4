"""Small guests for the tests of the emulator: assembled from a few lines, run in a machine with captured output."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lazymem.vm.devicestate import State
from lazymem.vm.machine import Ending, Machine, MachineConfig, block_sizes
from lazymem.vm.ram import RamBlocks
from tests.support.vmprocess import WAIT_SECONDS

MIB = 1 << 20
LOAD_ADDRESS = 0x100000

PRELUDE = """
    .code64
    .globl _start
    .equ PASS, 0x10
    .equ FAIL, 0x20
    .macro outb port, value
        mov $\\value, %al
        .if \\port < 0x100
        out %al, $\\port
        .else
        mov $\\port, %dx
        out %al, %dx
        .endif
    .endm
    .macro finish value
        mov $\\value, %eax
        out %al, $0xf4
    1:  hlt
        jmp 1b
    .endm
    # The gate for `vector`: interrupt gate, code selector 0x10, privilege level of callers, interrupt stack.
    .macro gate vector, handler, dpl=0, ist=0
        lea \\handler(%rip), %rax
        lea idt + 16 * \\vector(%rip), %rdi
        mov %ax, (%rdi)
        movw $0x10, 2(%rdi)
        movb $\\ist, 4(%rdi)
        movb $(0x8e | \\dpl << 5), 5(%rdi)
        shr $16, %rax
        mov %ax, 6(%rdi)
        shr $16, %rax
        mov %eax, 8(%rdi)
        movl $0, 12(%rdi)
    .endm
    .macro load_idt
        lidt idt_pointer(%rip)
    .endm
    # PIC at vectors 0x20 and 0x28, only the timer's line open; PIT channel 0 at `divisor` pulses of 1.193182 MHz.
    .macro start_timer divisor
        outb 0x20, 0x11
        outb 0xa0, 0x11
        outb 0x21, 0x20
        outb 0xa1, 0x28
        outb 0x21, 0x04
        outb 0xa1, 0x02
        outb 0x21, 0x01
        outb 0xa1, 0x01
        outb 0x21, 0xfe
        outb 0xa1, 0xff
        outb 0x43, 0x34
        mov $\\divisor, %eax
        out %al, $0x40
        mov %ah, %al
        out %al, $0x40
    .endm
    .macro end_of_interrupt
        push %rax
        mov $0x20, %al
        out %al, $0x20
        pop %rax
    .endm
    .data
    .balign 16
idt:
    .fill 4096, 1, 0
idt_pointer:
    .word 4095
    .quad idt
    .text
"""


def assemble(source: str, folder: Path) -> Path:
    """An ELF64 kernel from GNU assembler text, behind `PRELUDE`; entered at `_start`."""
    text, unlinked, kernel = folder / "guest.s", folder / "guest.o", folder / "guest.elf"
    text.write_text(f"{PRELUDE}\n{source}\n")
    subprocess.run(["as", "--64", "-o", unlinked, text], check=True)
    layout = [f"-Ttext={LOAD_ADDRESS:#x}", "-z", "noexecstack", "--no-warn-rwx-segments", "-N"]
    subprocess.run(["ld", "-static", "-nostdlib", "-e", "_start", *layout, "-o", kernel, unlinked], check=True)
    return kernel


class RecordedLine:
    """A serial line that keeps what the guest sent, and on which a test types."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sent = bytearray()
        self._waiting = bytearray()
        self._on_input: Callable[[], None] = lambda: None

    def start(self, on_input: Callable[[], None]) -> None:
        self._on_input = on_input

    def write(self, data: bytes) -> None:
        with self._changed:
            self._sent += data
            self._changed.notify_all()

    def read(self, limit: int) -> bytes:
        with self._changed:
            data = bytes(self._waiting[:limit])
            del self._waiting[:limit]
            return data

    def close(self) -> None:
        pass

    def type(self, data: bytes) -> None:
        with self._changed:
            self._waiting += data
        self._on_input()

    @property
    def sent(self) -> bytes:
        with self._changed:
            return bytes(self._sent)

    def wait_for(self, condition: Callable[[bytes], bool], timeout_seconds: float = WAIT_SECONDS) -> bytes:
        """What was sent, once `condition` holds for it."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(bytes(self._sent)), timeout_seconds):
                raise TimeoutError(f"the guest only sent {bytes(self._sent)!r}")
            return bytes(self._sent)


Saved = tuple[list[State], dict[str, bytes]]


class Rig:
    """A machine with its blocks, closed at the end of a `with`."""

    line_type: type[RecordedLine] = RecordedLine

    def __init__(self, config: MachineConfig, blocks: RamBlocks | None = None) -> None:
        self.line = self.line_type()
        self.blocks = blocks or RamBlocks(block_sizes(config))
        self.machine = Machine(config, self.blocks, self.line)

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        closed = self.machine.close()
        assert closed
        self.blocks.close()

    def boot(self) -> Rig:
        self.machine.boot()
        self.machine.start()
        return self

    def ended(self, timeout_seconds: float = WAIT_SECONDS) -> Ending:
        ending = self.machine.wait_ended(timeout_seconds)
        assert ending is not None, f"the guest still runs; it sent {self.line.sent!r}"
        return ending

    def save(self) -> Saved:
        """Every device's state and every block's bytes; the machine must stand."""
        states = [dict(device.state()) for device in self.machine.stateful()]
        return list(states), {name: block.read(0, block.size) for name, block in self.blocks.items()}

    def load(self, saved: Saved) -> Rig:
        states, memory = saved
        for name, data in memory.items():
            self.blocks[name].write(0, data)
        for device, state in zip(self.machine.stateful(), states, strict=True):
            device.load_state(state)
        return self
