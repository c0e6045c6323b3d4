"""The 8254, as the data sheet reads, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.vm.devices.pit import Pit
from lazymem.vm.devices.pitchannel import nanoseconds, pulses
from tests.support.chips import HandClock, LineProbe

CONTROL = 3


class Bench:
    """A timer, its clock in pulses, and what its interrupt line did."""

    def __init__(self) -> None:
        self.clock = HandClock(now_ns=1_000_000)
        self.line = LineProbe()
        self.pit = Pit(self.clock, self.line)
        self.start_ns = self.clock.ns

    def program(self, channel: int, mode: int, count: int, *, bcd: bool = False) -> None:
        self.pit.write(CONTROL, 1, channel << 6 | 0x30 | mode << 1 | bcd)
        self.pit.write(channel, 1, count & 0xFF)
        self.pit.write(channel, 1, count >> 8)
        self.start_ns = self.clock.ns

    def at(self, pulse: int) -> None:
        """The moment of a pulse since the last `program`; deadlines on the way are kept."""
        self.to_ns(self.start_ns + nanoseconds(pulse))

    def to_ns(self, target_ns: int) -> None:
        while (deadline := self.pit.next_deadline_ns()) is not None and deadline <= target_ns:
            self.clock.ns = max(self.clock.ns, deadline)
            self.pit.advance(self.clock.ns)
            following = self.pit.next_deadline_ns()
            assert following is None or following > self.clock.ns
        self.clock.ns = target_ns
        self.pit.advance(target_ns)

    def count(self, channel: int) -> int:
        self.pit.write(CONTROL, 1, channel << 6)
        return self.pit.read(channel, 1) | self.pit.read(channel, 1) << 8

    def status(self, channel: int) -> int:
        self.pit.write(CONTROL, 1, 0xE0 | 2 << channel)
        return self.pit.read(channel, 1)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@given(count=st.integers(0, 1 << 40))
def test_pulses_and_nanoseconds_agree(count: int) -> None:
    assert pulses(nanoseconds(count)) == count
    assert count == 0 or pulses(nanoseconds(count) - 1) == count - 1


def test_mode_0_rises_once_at_the_end(bench: Bench) -> None:
    bench.program(0, 0, 1000)
    assert not bench.line.level
    bench.at(999)
    assert (bench.line.level, bench.count(0)) == (False, 1)
    bench.at(1000)
    assert (bench.line.level, bench.count(0)) == (True, 0)
    bench.at(1010)
    assert (bench.line.rises, bench.count(0)) == (1, 0x10000 - 10), "it counts on, without another edge"
    assert bench.pit.next_deadline_ns() is None


def test_mode_0_starts_again_with_a_new_count(bench: Bench) -> None:
    bench.program(0, 0, 10)
    bench.at(20)
    assert bench.line.level
    bench.pit.write(0, 1, 100)
    assert not bench.line.level, "the first byte stops it"
    assert bench.pit.next_deadline_ns() is None
    bench.pit.write(0, 1, 0)
    bench.start_ns = bench.clock.ns
    bench.at(99)
    assert not bench.line.level
    bench.at(100)
    assert bench.line.level


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
def test_periodic_modes_rise_once_a_period(bench: Bench, mode: int) -> None:
    bench.program(0, mode, 11932)
    first = bench.line.rises
    for period in range(1, 50):
        bench.at(period * 11932 - 1)
        assert bench.line.rises == first + period - 1
        bench.at(period * 11932)
        assert bench.line.rises == first + period


def test_mode_2_counts_down_and_is_low_for_one_pulse(bench: Bench) -> None:
    bench.program(2, 2, 100)
    bench.pit.set_gate2(True)
    for pulse, count, output in ((0, 100, True), (1, 99, True), (98, 2, True), (99, 1, False), (100, 100, True)):
        bench.at(pulse)
        assert (bench.count(2), bench.pit.output2()) == (count, output)


@pytest.mark.parametrize(("count", "high"), [(100, 50), (101, 51)])
def test_mode_3_is_high_for_half_the_period(bench: Bench, count: int, high: int) -> None:
    bench.pit.set_gate2(True)
    bench.program(2, 3, count)
    levels = []
    for pulse in range(count):
        bench.at(pulse)
        levels.append(bench.pit.output2())
    assert levels == [True] * high + [False] * (count - high)


def test_mode_3_counts_by_two(bench: Bench) -> None:
    bench.program(0, 3, 1000)
    readings = []
    for pulse in (0, 1, 2, 499, 500, 501):
        bench.at(pulse)
        readings.append(bench.count(0))
    assert readings == [1000, 998, 996, 2, 1000, 998]


def test_count_zero_is_65536(bench: Bench) -> None:
    bench.program(0, 2, 0)
    first = bench.line.rises
    bench.at(65535)
    assert (bench.line.rises, bench.count(0)) == (first, 1)
    bench.at(65536)
    assert (bench.line.rises, bench.count(0)) == (first + 1, 0)


def test_bcd_counts_in_decimal(bench: Bench) -> None:
    bench.program(0, 2, 0x1000, bcd=True)
    bench.at(1)
    assert bench.count(0) == 0x0999
    bench.program(0, 2, 0, bcd=True)
    assert bench.count(0) == 0, "10000 shows as four zeros"
    bench.at(1)
    assert bench.count(0) == 0x9999


def test_latch_holds_the_count_until_it_is_read(bench: Bench) -> None:
    bench.program(0, 2, 0x1234)
    bench.at(4)
    bench.pit.write(CONTROL, 1, 0x00)
    bench.at(0x100)
    bench.pit.write(CONTROL, 1, 0x00)
    assert bench.pit.read(0, 1) | bench.pit.read(0, 1) << 8 == 0x1230, "a second latch command is ignored"
    assert bench.count(0) == 0x1134


def test_unlatched_reads_alternate_low_and_high(bench: Bench) -> None:
    bench.program(0, 2, 0x1234)
    assert [bench.pit.read(0, 1) for _ in range(4)] == [0x34, 0x12, 0x34, 0x12]


@pytest.mark.parametrize(("access", "count"), [(1, 0x80), (2, 0x8000)])
def test_single_byte_access(bench: Bench, access: int, count: int) -> None:
    bench.pit.write(CONTROL, 1, access << 4 | 2 << 1)
    bench.pit.write(0, 1, 0x80)
    bench.start_ns = bench.clock.ns
    assert bench.pit.read(0, 1) == 0x80
    bench.pit.write(CONTROL, 1, 0x00)
    assert bench.pit.read(0, 1) == 0x80
    deadline = bench.pit.next_deadline_ns()
    assert deadline == bench.start_ns + nanoseconds(count)


def test_status_tells_output_null_count_and_mode(bench: Bench) -> None:
    bench.pit.write(CONTROL, 1, 0x30)
    assert bench.status(0) == 0x70, "mode 0: output low, no count loaded"
    bench.pit.write(0, 1, 10)
    bench.pit.write(0, 1, 0)
    assert bench.status(0) == 0x30
    bench.start_ns = bench.clock.ns
    bench.at(10)
    assert bench.status(0) == 0xB0
    bench.program(2, 3, 100, bcd=True)
    assert bench.status(2) == 0x80 | 0x30 | 3 << 1 | 1


def test_read_back_latches_several_channels_and_both_halves(bench: Bench) -> None:
    bench.program(0, 2, 500)
    bench.pit.set_gate2(True)
    bench.program(2, 0, 700)
    bench.pit.write(CONTROL, 1, 0xC0 | 2 | 8)
    bench.at(50)
    assert bench.pit.read(0, 1) == 0x80 | 0x30 | 2 << 1, "status first"
    assert bench.pit.read(0, 1) | bench.pit.read(0, 1) << 8 == 500
    assert bench.pit.read(2, 1) == 0x30
    assert bench.pit.read(2, 1) | bench.pit.read(2, 1) << 8 == 700


def test_gate_pauses_mode_0(bench: Bench) -> None:
    bench.program(2, 0, 1000)
    bench.at(300)
    assert bench.count(2) == 1000, "the gate is low after a reset"
    bench.pit.set_gate2(True)
    bench.start_ns = bench.clock.ns
    bench.at(400)
    bench.pit.set_gate2(False)
    bench.at(5000)
    assert (bench.count(2), bench.pit.output2()) == (600, False)
    bench.pit.set_gate2(True)
    bench.start_ns = bench.clock.ns
    bench.at(599)
    assert not bench.pit.output2()
    bench.at(600)
    assert bench.pit.output2()


@pytest.mark.parametrize("mode", [2, 3])
def test_gate_restarts_periodic_modes(bench: Bench, mode: int) -> None:
    bench.pit.set_gate2(True)
    bench.program(2, mode, 1000)
    bench.at(999)
    assert not bench.pit.output2()
    bench.pit.set_gate2(False)
    assert bench.pit.output2(), "a low gate puts the output high"
    bench.at(3000)
    bench.pit.set_gate2(True)
    assert bench.count(2) == 1000


def test_mode_1_is_a_one_shot_by_the_gate(bench: Bench) -> None:
    bench.program(2, 1, 100)
    bench.at(500)
    assert bench.pit.output2(), "nothing without a trigger"
    bench.pit.set_gate2(True)
    bench.start_ns = bench.clock.ns
    bench.at(99)
    assert not bench.pit.output2()
    bench.at(100)
    assert bench.pit.output2()


def test_mode_4_strobes_once(bench: Bench) -> None:
    bench.program(0, 4, 100)
    assert bench.line.level
    bench.at(101)
    assert bench.line.level
    assert bench.pit.next_deadline_ns() is None


def test_missed_periods_give_one_edge(bench: Bench) -> None:
    bench.program(0, 2, 1000)
    first = bench.line.rises
    bench.clock.ns = bench.start_ns + nanoseconds(50_500)
    bench.pit.advance(bench.clock.ns)
    assert bench.line.rises == first + 1
    assert bench.pit.next_deadline_ns() == bench.start_ns + nanoseconds(51_000)


def test_reprogramming_another_channel_does_not_repeat_an_edge(bench: Bench) -> None:
    bench.program(0, 3, 1000)
    first = bench.line.rises
    bench.clock.ns = bench.start_ns + nanoseconds(1000)
    bench.pit.write(CONTROL, 1, 0x80)
    bench.pit.advance(bench.clock.ns)
    assert bench.line.rises == first + 1


STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3), st.integers(0, 255)),
    st.tuples(st.just("read"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("gate"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("wait"), st.just(0), st.integers(0, 70_000_000)),
)
Steps = list[tuple[str, int, int]]


def take(bench: Bench, step: tuple[str, int, int]) -> int:
    kind, where, value = step
    if kind == "write":
        bench.pit.write(where, 1, value)
    elif kind == "read":
        return bench.pit.read(where, 1)
    elif kind == "gate":
        bench.pit.set_gate2(bool(where))
    else:
        bench.to_ns(bench.clock.ns + value)
    return 0


@given(before=st.lists(STEP, max_size=20), after=st.lists(STEP, max_size=20))
def test_loaded_timer_behaves_like_the_saved_one(before: Steps, after: Steps) -> None:
    saved = Bench()
    for step in before:
        take(saved, step)
    loaded = Bench()
    # Before the clock is set: a load must not ask for the time.
    loaded.pit.load_state(saved.pit.state())
    loaded.clock.ns, loaded.line.level = saved.clock.ns, saved.line.level
    saved.line.rises = 0
    for step in after:
        assert take(loaded, step) == take(saved, step)
        assert (loaded.line.level, loaded.line.rises) == (saved.line.level, saved.line.rises)
        assert loaded.pit.output2() == saved.pit.output2()
        assert loaded.pit.next_deadline_ns() == saved.pit.next_deadline_ns()


@given(steps=st.lists(STEP, max_size=40))
def test_deadlines_always_lie_ahead_and_state_always_fits(steps: Steps) -> None:
    bench = Bench()
    for step in steps:
        take(bench, step)
        bench.pit.advance(bench.clock.ns)
        deadline = bench.pit.next_deadline_ns()
        assert deadline is None or deadline > bench.clock.ns
        Bench().pit.load_state(bench.pit.state())
