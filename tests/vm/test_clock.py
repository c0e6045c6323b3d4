"""Virtual time: stands with the guest, goes on from a saved value, counts only what is charged."""

from __future__ import annotations

import pytest

from lazymem.errors import SaveStreamError
from lazymem.vm.clock import NS_PER_INSTRUCTION, OUTSIDE_ACCESS_NS, InstructionClock, WallClock, earliest_deadline_ns
from lazymem.vm.clockstate import ClockState
from lazymem.vm.devicestate import Value


class HostClock:
    def __init__(self) -> None:
        self.ns = 1_000

    def __call__(self) -> int:
        return self.ns


def test_wall_clock_runs_with_the_guest_only() -> None:
    host = HostClock()
    clock = WallClock(host)
    host.ns += 50
    assert clock.now_ns() == 0
    clock.start()
    host.ns += 7
    clock.start()
    assert clock.now_ns() == 7
    clock.stop()
    host.ns += 1_000
    clock.stop()
    assert clock.now_ns() == 7
    clock.start()
    host.ns += 3
    assert clock.now_ns() == 10


def test_wall_clock_goes_on_from_a_saved_time() -> None:
    host = HostClock()
    clock = WallClock(host)
    ClockState(clock).load_state({"now_ns": 5_000})
    clock.start()
    host.ns += 5
    assert clock.now_ns() == 5_005


def test_instruction_clock_counts_what_is_charged() -> None:
    clock = InstructionClock()
    clock.start()
    clock.executed(10)
    clock.accessed_outside()
    assert clock.now_ns() == 10 * NS_PER_INSTRUCTION + OUTSIDE_ACCESS_NS
    clock.jump_to(5)
    assert clock.now_ns() == 10 * NS_PER_INSTRUCTION + OUTSIDE_ACCESS_NS, "time never goes back"
    clock.jump_to(1_000_000)
    clock.stop()
    assert ClockState(clock).state() == {"now_ns": 1_000_000}


@pytest.mark.parametrize("value", [-1, 1 << 63, b"x", None])
def test_senseless_times_are_refused(value: Value | None) -> None:
    clock = InstructionClock()
    with pytest.raises(SaveStreamError, match="virtual-clock"):
        ClockState(clock).load_state({} if value is None else {"now_ns": value})
    assert clock.now_ns() == 0


class FixedTimer:
    def __init__(self, deadline: int | None) -> None:
        self.deadline = deadline

    def next_deadline_ns(self) -> int | None:
        return self.deadline

    def advance(self, now_ns: int) -> None:
        raise NotImplementedError


def test_earliest_deadline() -> None:
    assert earliest_deadline_ns([]) is None
    assert earliest_deadline_ns([FixedTimer(None), FixedTimer(7), FixedTimer(0)]) == 0
