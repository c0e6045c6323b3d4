"""The MC146818, as the data sheet reads, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.vm.devices import rtcclock
from lazymem.vm.devices.cmos import Cmos
from tests.support.chips import HandClock, LineProbe

SECOND = 1_000_000_000
A, B, C, D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
SET, PIE, AIE, UIE, BINARY, HOURS_24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
EVENING = int(datetime(1999, 12, 31, 23, 59, 58, tzinfo=UTC).timestamp())


class Watch:
    def __init__(self, epoch_seconds: int = EVENING, ram_bytes: int = 0) -> None:
        self.clock = HandClock()
        self.line = LineProbe()
        self.cmos = Cmos(self.clock, self.line, epoch_seconds=epoch_seconds, ram_bytes=ram_bytes)

    def read(self, index: int) -> int:
        self.cmos.write(0, 1, index)
        return self.cmos.read(1, 1)

    def write(self, index: int, value: int) -> None:
        self.cmos.write(0, 1, index)
        self.cmos.write(1, 1, value)

    def time(self) -> list[int]:
        """Century, year, month, day, hour, minute, second, as they are in the registers."""
        return [self.read(index) for index in (CENTURY, 9, 8, 7, 4, 2, 0)]

    def deadlines(self, until_ns: int) -> Iterator[int]:
        """Let time pass, calling at each deadline; gives the moments."""
        while (deadline := self.cmos.next_deadline_ns()) is not None and deadline <= until_ns:
            self.clock.ns = max(self.clock.ns, deadline)
            self.cmos.advance(self.clock.ns)
            yield self.clock.ns
        self.clock.ns = until_ns


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_calendar_in_decimal_goes_over_the_century(watch: Watch) -> None:
    assert watch.time() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]
    assert watch.read(6) == 6, "a Friday; Sunday is 1"
    watch.clock.ns = 2 * SECOND
    assert watch.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_binary_mode(watch: Watch) -> None:
    watch.write(B, BINARY | HOURS_24)
    assert watch.time() == [19, 99, 12, 31, 23, 59, 58]


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_twelve_hour_mode(hour: int, shown: int) -> None:
    watch = Watch(epoch_seconds=hour * 3600)
    watch.write(B, 0)
    assert watch.read(4) == shown
    watch.write(4, shown)
    watch.write(B, BINARY | HOURS_24)
    assert watch.read(4) == hour


@given(seconds=st.integers(0, rtcclock.LAST_SECOND), b=st.sampled_from([0, BINARY, HOURS_24, BINARY | HOURS_24]))
def test_every_moment_is_read_back(seconds: int, b: int) -> None:
    assert rtcclock.maybe_decode(rtcclock.encode(seconds, b), b) == seconds


def test_setting_stops_the_calendar_and_starts_it_where_it_was_put(watch: Watch) -> None:
    watch.write(B, SET | HOURS_24)
    watch.clock.ns = 100 * SECOND
    assert watch.time() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]
    for index, value in ((CENTURY, 0x20), (9, 0x24), (8, 0x02), (7, 0x29), (4, 0x12), (2, 0x30), (0, 0x00)):
        watch.write(index, value)
    watch.write(B, HOURS_24)
    watch.clock.ns += 61 * SECOND
    assert watch.time() == [0x20, 0x24, 0x02, 0x29, 0x12, 0x31, 0x01]


def test_a_moment_that_is_none_changes_nothing(watch: Watch) -> None:
    watch.write(8, 0x13)
    assert watch.time() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]


def test_update_in_progress_warns_before_each_second(watch: Watch) -> None:
    for ns, updating in ((0, 0), (SECOND - 244_001, 0), (SECOND - 244_000, 0x80), (SECOND - 1, 0x80), (SECOND, 0)):
        watch.clock.ns = ns
        assert watch.read(A) & 0x80 == updating
    watch.write(B, SET | HOURS_24)
    watch.clock.ns = 2 * SECOND - 1
    assert watch.read(A) & 0x80 == 0, "no updates while it is set"


def test_flags_are_there_without_interrupts_and_go_by_reading(watch: Watch) -> None:
    watch.read(C)
    watch.clock.ns = SECOND
    flags = watch.read(C)
    assert flags & 0x90 == 0x10, "updated, no interrupt"
    assert watch.read(C) & 0x10 == 0
    assert watch.cmos.next_deadline_ns() is None
    assert watch.read(D) == 0x80


def test_update_interrupt_each_second(watch: Watch) -> None:
    watch.write(B, UIE | HOURS_24)
    moments = []
    for moment in watch.deadlines(3 * SECOND + 1):
        moments.append(moment)
        assert watch.line.level
        assert watch.read(C) & 0x90 == 0x90
        assert not watch.line.level
    assert moments == [SECOND, 2 * SECOND, 3 * SECOND]
    assert watch.line.rises == 3


def test_an_interrupt_that_nobody_reads_stays_one(watch: Watch) -> None:
    watch.write(B, UIE | HOURS_24)
    assert len(list(watch.deadlines(5 * SECOND))) == 5
    assert (watch.line.level, watch.line.rises) == (True, 1)


@pytest.mark.parametrize(("rate", "hz"), [(6, 1024), (15, 2), (3, 8192), (1, 256), (2, 128)])
def test_periodic_interrupt(watch: Watch, rate: int, hz: int) -> None:
    watch.write(A, 0x20 | rate)
    watch.write(B, PIE | HOURS_24)
    for _ in watch.deadlines(SECOND):
        assert watch.read(C) & 0xC0 == 0xC0
    assert watch.line.rises == hz


def test_periodic_rate_zero_is_none(watch: Watch) -> None:
    watch.write(A, 0x20)
    watch.write(B, PIE | HOURS_24)
    assert watch.cmos.next_deadline_ns() is None


@pytest.mark.parametrize(
    ("alarm", "second"),
    [((0x23, 0x59, 0x59), 1), ((0x00, 0x00, 0x03), 5), ((0xC0, 0xFF, 0x04), 6), ((0x00, 0x01, 0x00), 62)],
)
def test_alarm(watch: Watch, alarm: tuple[int, int, int], second: int) -> None:
    for index, value in zip((5, 3, 1), alarm, strict=True):
        watch.write(index, value)
    watch.write(B, AIE | HOURS_24)
    rung = [moment for moment in watch.deadlines(63 * SECOND) if watch.read(C) & 0xA0 == 0xA0]
    assert rung[0] == second * SECOND


def test_alarm_is_found_in_a_long_sleep(watch: Watch) -> None:
    for index, value in ((5, 0x12), (3, 0x00), (1, 0x00)):
        watch.write(index, value)
    watch.clock.ns = 10 * 86_400 * SECOND
    assert watch.read(C) & 0x20


@pytest.mark.parametrize(
    ("ram_mib", "base_kib", "extended_kib", "above_16m"),
    [(2, 640, 1024, 0), (16, 640, 15 * 1024, 0), (64, 640, 63 * 1024, 48 * 16), (1 << 20, 640, 0xFFFF, 0xFFFF)],
)
def test_memory_sizes(ram_mib: int, base_kib: int, extended_kib: int, above_16m: int) -> None:
    watch = Watch(ram_bytes=ram_mib << 20)

    def word(at: int) -> int:
        return watch.read(at) | watch.read(at + 1) << 8

    assert (word(0x15), word(0x17), word(0x30), word(0x34)) == (base_kib, extended_kib, extended_kib, above_16m)


def test_memory_keeps_what_is_written_and_read_only_registers_do_not(watch: Watch) -> None:
    for index in (0x0E, 0x40, 0x7F):
        watch.write(index, index ^ 0xFF)
    for index in (C, D):
        watch.write(index, 0x55)
    assert [watch.read(index) for index in (0x0E, 0x40, 0x7F)] == [0xF1, 0xBF, 0x80]
    assert watch.read(D) == 0x80
    assert watch.cmos.read(0, 1) == 0xFF, "the index cannot be read"


def test_index_ignores_the_nmi_bit(watch: Watch) -> None:
    watch.write(0x40, 1)
    watch.write(0xC0, 2)
    assert watch.read(0x40) == 2


STEP = st.one_of(
    st.tuples(st.just("write"), st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, A, B, C, D, 0x40]), st.integers(0, 255)),
    st.tuples(st.just("read"), st.integers(0, 0x40), st.just(0)),
    st.tuples(st.just("wait"), st.just(0), st.integers(0, 3 * SECOND)),
)
Steps = list[tuple[str, int, int]]


def take(watch: Watch, step: tuple[str, int, int]) -> int:
    kind, where, value = step
    if kind == "write":
        watch.write(where, value)
    elif kind == "read":
        return watch.read(where)
    else:
        watch.clock.ns += value
        watch.cmos.advance(watch.clock.ns)
        deadline = watch.cmos.next_deadline_ns()
        assert deadline is None or deadline > watch.clock.ns
    return 0


@given(before=st.lists(STEP, max_size=20), after=st.lists(STEP, max_size=20))
def test_loaded_clock_behaves_like_the_saved_one(before: Steps, after: Steps) -> None:
    saved = Watch()
    for step in before:
        take(saved, step)
    loaded = Watch(epoch_seconds=0)
    loaded.cmos.load_state(saved.cmos.state())
    loaded.clock.ns, loaded.line.level = saved.clock.ns, saved.line.level
    for step in after:
        assert take(loaded, step) == take(saved, step)
        assert loaded.line.level == saved.line.level
        assert loaded.cmos.next_deadline_ns() == saved.cmos.next_deadline_ns()
