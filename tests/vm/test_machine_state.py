"""A saved and loaded guest goes on exactly where it was; a state of another library, or an altered one, is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lazymem.errors import SaveStreamError
from lazymem.vm.devicestate import State
from lazymem.vm.machine import MachineConfig
from tests.support.machines import MIB, RecordedLine, Rig, Saved, assemble

BUSY = """
    # Mixes x87, SSE, the time stamp counter and timer ticks into one sum; sends a byte of it every 2,000 rounds.
_start:
    gate 0x20, tick
    load_idt
    start_timer 1193
    fninit
    fld1
    mov $0x3f8, %dx
    mov $1, %r12
    movq %r12, %xmm1
    xor %r13d, %r13d
    sti
again:
    imul $0x5851f42d, %r12, %r12
    add $0x14057b7e, %r12
    movq %r12, %xmm0
    paddq %xmm0, %xmm1
    pshufd $0x1b, %xmm1, %xmm1
    fldpi
    fmulp
    fsqrt
    inc %r13
    mov %r13, %rax
    xor %edx, %edx
    mov $2000, %ecx
    div %rcx
    test %edx, %edx
    jnz again
    rdtsc
    add %rax, %r12
    add ticks(%rip), %r12
    fstpt number(%rip)
    fldt number(%rip)
    add number(%rip), %r12
    movq %xmm1, %rax
    add %rax, %r12
    mov %r12, %rax
    shr $24, %rax
    mov $0x3f8, %dx
    out %al, %dx
    # Half of the time, idle until the next tick.
    test $1, %al
    jz 2f
    hlt
2:  cmp $200000, %r13
    jb again
    finish PASS
tick:
    incq ticks(%rip)
    end_of_interrupt
    iretq
    .data
    .balign 16
ticks: .quad 0
number: .fill 16, 1, 0
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(BUSY, tmp_path_factory.mktemp("busy"))


class StoppingLine(RecordedLine):
    """Asks for a stop when the guest has sent so many bytes: a moment that is the same in every run."""

    def __init__(self) -> None:
        super().__init__()
        self.stop_at = 0
        self.request_stop: Callable[[], None] = lambda: None

    def write(self, data: bytes) -> None:
        super().write(data)
        if len(self.sent) == self.stop_at:
            self.request_stop()


class StoppingRig(Rig):
    line_type = StoppingLine


def whole_run(kernel: Path) -> tuple[bytes, Saved]:
    with Rig(MachineConfig(4 * MIB, kernel, icount=True, icount_sleep=False)) as rig:
        assert rig.boot().ended().exit_code == 33
        assert rig.machine.stop()
        return rig.line.sent, rig.save()


def run_until(rig: Rig, sent_bytes: int) -> None:
    line = rig.line
    assert isinstance(line, StoppingLine)
    line.stop_at, line.request_stop = sent_bytes, rig.machine.request_stop
    rig.machine.start()
    line.wait_for(lambda sent: len(sent) >= sent_bytes)
    assert rig.machine.stop(10)


def run_in_parts(kernel: Path, splits: Sequence[int]) -> tuple[bytes, Saved]:
    """The same run, saved and loaded into a fresh machine after each of `splits` bytes."""
    config = MachineConfig(4 * MIB, kernel, icount=True, icount_sleep=False)
    sent, saved = b"", None
    for split in splits:
        with StoppingRig(config) as rig:
            if saved is None:
                rig.machine.boot()
            else:
                rig.load(saved)
            run_until(rig, split - len(sent))
            sent, saved = sent + rig.line.sent, rig.save()
    assert saved is not None
    with Rig(config) as rig:
        rig.load(saved).machine.start()
        assert rig.ended().exit_code == 33
        assert rig.machine.stop()
        return sent + rig.line.sent, rig.save()


def test_counted_run_repeats(kernel: Path) -> None:
    sent, (states, memory) = whole_run(kernel)
    assert len(set(sent)) > 40, "the guest's output must depend on much for this to mean anything"
    again, (other_states, other_memory) = whole_run(kernel)
    assert (again, other_states, other_memory) == (sent, states, memory)


@pytest.mark.parametrize("splits", [(1,), (7,), (50,), (99,), (3, 4, 60), (20, 40, 80)])
def test_counted_run_does_not_depend_on_where_it_is_cut(kernel: Path, splits: tuple[int, ...]) -> None:
    sent, (states, memory) = whole_run(kernel)
    cut, (cut_states, cut_memory) = run_in_parts(kernel, splits)
    assert cut == sent
    assert cut_memory == memory
    assert cut_states == states


def test_saving_changes_nothing(kernel: Path) -> None:
    config = MachineConfig(4 * MIB, kernel, icount=True, icount_sleep=False)
    with StoppingRig(config) as rig:
        rig.machine.boot()
        run_until(rig, 10)
        first = rig.save()
        assert rig.save() == first
        run_until(rig, 20)
        line = rig.line
        assert isinstance(line, StoppingLine)
        line.stop_at = 0
        rig.machine.start()
        assert rig.ended().exit_code == 33
        assert rig.line.sent == whole_run(kernel)[0]


def test_states_fill_their_layouts(kernel: Path) -> None:
    with Rig(MachineConfig(4 * MIB, kernel)) as rig:
        rig.machine.boot()
        seen = []
        for device in rig.machine.stateful():
            state = device.state()
            seen.append((device.layout.name, device.layout.instance))
            assert set(state) == {field.name for field in device.layout.fields}
            for field in device.layout.fields:
                value = state[field.name]
                if field.buffer:
                    assert isinstance(value, bytes)
                    assert len(value) == field.size_bytes
                else:
                    assert isinstance(value, int)
                    assert 0 <= value < 1 << 8 * field.size_bytes, field.name
        assert len(set(seen)) == len(seen)


@pytest.fixture
def cpu_state(kernel: Path) -> State:
    with Rig(MachineConfig(4 * MIB, kernel)) as rig:
        rig.machine.boot()
        return rig.machine.cpu.state()


def test_registers_are_there_by_name(cpu_state: State) -> None:
    named = {name: cpu_state[name] for name in ("cs_selector", "cr0", "efer", "privilege_level", "halted")}
    assert named == {"cs_selector": 0x10, "cr0": 0x8001_0033, "efer": 0xD01, "privilege_level": 0, "halted": 0}
    assert cpu_state["rip"] == 0x100000
    assert isinstance(cpu_state["rsi"], int)


def altered(state: State, field: str) -> State:
    value = state[field]
    return {**state, field: value + 1 if isinstance(value, int) else bytes([value[0] ^ 1]) + value[1:]}


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("context", "altered"),
        ("context_digest", "altered"),
        ("context_size", "saved with Unicorn 2.1"),
        ("unicorn_version", "resume it with the version that saved it"),
    ],
)
def test_foreign_or_altered_context_is_refused(kernel: Path, cpu_state: State, field: str, reason: str) -> None:
    with Rig(MachineConfig(4 * MIB, kernel)) as rig:
        rig.machine.boot()
        before = rig.save()
        with pytest.raises(SaveStreamError, match=reason):
            rig.machine.cpu.load_state(altered(cpu_state, field))
        assert rig.save() == before


@pytest.mark.parametrize(("field", "value"), [("halted", 2), ("msr_2ff", b"x"), ("halt_sites", b"short")])
def test_senseless_values_are_refused(kernel: Path, cpu_state: State, field: str, value: int | bytes) -> None:
    with Rig(MachineConfig(4 * MIB, kernel)) as rig:
        rig.machine.boot()
        before = rig.save()
        with pytest.raises(SaveStreamError, match="section cpu"):
            rig.machine.cpu.load_state({**cpu_state, field: value})
        assert rig.save() == before


MEMORY_TYPES = """
_start:
    mov $0x2ff, %ecx
    mov $0xc06, %eax
    xor %edx, %edx
    wrmsr
    mov $0x201, %ecx
    mov $0xf0000800, %eax
    mov $0xf, %edx
    wrmsr
    rdmsr
    cmp $0xf0000800, %eax
    jne bad
    mov $0x2ff, %ecx
    rdmsr
    cmp $0xc06, %eax
    jne bad
    finish PASS
bad:
    finish FAIL
"""


def test_memory_types_travel_too(tmp_path: Path) -> None:
    """The library keeps these registers outside of its context."""
    config = MachineConfig(4 * MIB, assemble(MEMORY_TYPES, tmp_path), icount=True)
    with Rig(config) as rig:
        rig.machine.boot()
        states = {device.layout.name: device.state() for device in rig.machine.stateful()}
        rig.machine.start()
        assert rig.ended().exit_code == 33
        after = rig.machine.cpu.state()
    assert states["cpu"]["msr_2ff"] == 0
    assert (after["msr_2ff"], after["msr_201"]) == (0xC06, 0xF_F000_0800)
    with Rig(config) as rig:
        rig.machine.cpu.load_state(after)
        assert {name: rig.machine.cpu.state()[name] for name in after} == after


def test_saved_context_holds_no_pointer_of_this_process(kernel: Path) -> None:
    """Two processes that did the same must save the same bytes."""
    _, (states, _) = whole_run(kernel)
    context = next(state["context"] for state in states if "context" in state)
    assert isinstance(context, bytes)
    assert context[:40] == bytes(40)
    assert context[-8:] == bytes(8)
