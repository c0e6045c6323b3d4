"""The 16550A, as the data sheet reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.vm.devices.uart import FIFO_BYTES, Uart
from tests.support.chips import LineProbe

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
NONE, MODEM, EMPTY, RECEIVED, LINE, TIMEOUT = 0x1, 0x0, 0x2, 0x4, 0x6, 0xC


class Wire:
    """A UART with both ends of its line in hand."""

    def __init__(self) -> None:
        self.line = LineProbe()
        self.sent = bytearray()
        self.waiting = bytearray()
        self.uart = Uart(self.line, self.sent.extend, self._give)

    def _give(self, limit: int) -> bytes:
        assert limit > 0
        data = bytes(self.waiting[:limit])
        del self.waiting[:limit]
        return data

    def bring(self, data: bytes) -> None:
        self.waiting += data
        self.uart.poll_input()

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def identify(self) -> int:
        return self.read(IIR) & 0xF

    def read_all(self) -> bytes:
        data = bytearray()
        while self.read(LSR) & 1:
            data.append(self.read(DATA))
        return bytes(data)


@pytest.fixture
def wire() -> Wire:
    """With OUT2 set, so that interrupts get out."""
    wire = Wire()
    wire.write(MCR, 0x0B)
    return wire


def test_bytes_written_are_sent_in_order(wire: Wire) -> None:
    for byte in b"hello":
        assert wire.read(LSR) == 0x60
        wire.write(DATA, byte)
    assert wire.sent == b"hello"


def test_divisor_latch_hides_data_and_interrupt_enable(wire: Wire) -> None:
    wire.write(IER, 0x01)
    wire.write(LCR, 0x83)
    wire.write(DATA, 0x34)
    wire.write(IER, 0x12)
    assert (wire.read(DATA), wire.read(IER), wire.read(LCR)) == (0x34, 0x12, 0x83)
    wire.write(LCR, 0x03)
    assert wire.read(IER) == 0x01
    assert not wire.sent


def test_scratch_and_reserved_bits(wire: Wire) -> None:
    wire.write(SCR, 0xA7)
    wire.write(IER, 0xF0)
    wire.write(MCR, 0xE0)
    assert (wire.read(SCR), wire.read(IER), wire.read(MCR)) == (0xA7, 0, 0)


def test_without_fifo_one_byte_is_held_and_the_rest_waits_outside(wire: Wire) -> None:
    wire.bring(b"abc")
    assert wire.waiting == b"bc"
    assert wire.read_all() == b"abc"
    assert wire.read(DATA) == 0


def test_fifo_holds_sixteen_and_no_byte_is_lost(wire: Wire) -> None:
    wire.write(FCR, 0x01)
    text = bytes(range(50))
    wire.bring(text)
    assert len(wire.waiting) == 50 - FIFO_BYTES
    assert wire.read_all() == text


def test_identification_tells_of_the_fifo(wire: Wire) -> None:
    assert wire.read(IIR) == 0x01
    wire.write(FCR, 0x01)
    assert wire.read(IIR) == 0xC1
    wire.write(FCR, 0x00)
    assert wire.read(IIR) == 0x01


@pytest.mark.parametrize(("trigger", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_level_divides_time_out_from_received(wire: Wire, trigger: int, level: int) -> None:
    wire.write(FCR, 0x01 | trigger)
    wire.write(IER, 0x01)
    wire.bring(bytes(level - 1))
    assert wire.identify() == (TIMEOUT if level > 1 else NONE)
    wire.bring(b"x")
    assert wire.identify() == RECEIVED
    assert wire.line.level
    wire.read_all()
    assert (wire.identify(), wire.line.level) == (NONE, False)


def test_receive_interrupt_needs_to_be_enabled(wire: Wire) -> None:
    wire.bring(b"x")
    assert not wire.line.level
    wire.write(IER, 0x01)
    assert wire.line.level
    wire.write(IER, 0x00)
    assert not wire.line.level


def test_empty_interrupt_comes_by_enabling_and_by_each_byte(wire: Wire) -> None:
    wire.write(IER, 0x02)
    assert wire.line.level
    assert wire.identify() == EMPTY
    assert (wire.identify(), wire.line.level) == (NONE, False), "reading IIR takes it away"
    wire.write(DATA, 0x41)
    assert wire.line.level
    wire.write(IER, 0x02)
    assert wire.identify() == EMPTY
    wire.write(IER, 0x02)
    assert wire.identify() == NONE, "writing the same again enables nothing new"


def test_interrupts_are_told_in_order_of_priority(wire: Wire) -> None:
    wire.write(MCR, 0x1A)
    for byte in (1, 2):
        wire.write(DATA, byte)
    wire.write(MCR, 0x1B)
    wire.write(IER, 0x0F)
    seen = []
    seen.append(wire.identify())
    assert wire.read(LSR) & 0x02, "the second byte ran over the first"
    seen.append(wire.identify())
    assert wire.read(DATA) == 2
    seen.extend([wire.identify(), wire.identify()])
    assert wire.read(MSR) & 0xF
    seen.append(wire.identify())
    assert seen == [LINE, RECEIVED, EMPTY, MODEM, NONE]


def test_out2_gates_the_interrupt(wire: Wire) -> None:
    wire.write(IER, 0x01)
    wire.bring(b"x")
    assert wire.line.level
    wire.write(MCR, 0x03)
    assert not wire.line.level
    wire.write(MCR, 0x0B)
    assert wire.line.level


def test_loop_back_keeps_bytes_inside(wire: Wire) -> None:
    wire.write(FCR, 0x01)
    wire.write(MCR, 0x1B)
    for byte in b"inside":
        wire.write(DATA, byte)
    wire.bring(b"outside")
    assert wire.read_all() == b"inside"
    assert wire.sent == b""
    wire.write(MCR, 0x0B)
    assert wire.read_all() == b"outside", "what came meanwhile is still there"


def test_loop_back_overruns_a_full_fifo(wire: Wire) -> None:
    wire.write(FCR, 0x01)
    wire.write(MCR, 0x10)
    for byte in range(FIFO_BYTES + 1):
        wire.write(DATA, byte)
    assert wire.read(LSR) & 0x03 == 0x03
    assert wire.read(LSR) & 0x02 == 0, "reading LSR clears it"
    assert wire.read_all() == bytes(range(FIFO_BYTES))


@pytest.mark.parametrize(("mcr", "msr"), [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0)])
def test_loop_back_of_modem_lines(wire: Wire, mcr: int, msr: int) -> None:
    wire.write(MCR, mcr)
    assert wire.read(MSR) & 0xF0 == msr
    wire.write(MCR, 0)
    assert wire.read(MSR) & 0xF0 == 0xB0, "a terminal is connected"


def test_modem_changes_are_told_once_and_ring_by_its_end(wire: Wire) -> None:
    wire.write(MCR, 0x10)
    assert wire.read(MSR) == 0x0B
    assert wire.read(MSR) == 0x00
    wire.write(MCR, 0x14)
    assert wire.read(MSR) == 0x40
    wire.write(MCR, 0x10)
    assert wire.read(MSR) == 0x04


@pytest.mark.parametrize("fcr", [0x03, 0x00])
def test_fifo_reset_throws_received_bytes_away(wire: Wire, fcr: int) -> None:
    wire.write(FCR, 0x01)
    wire.write(IER, 0x01)
    wire.bring(b"abc")
    wire.write(FCR, fcr)
    assert (wire.read_all(), wire.line.level) == (b"", False)


STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
    st.tuples(st.just("bring"), st.just(0), st.integers(1, 20)),
)
Steps = list[tuple[str, int, int]]


def take(wire: Wire, step: tuple[str, int, int]) -> int:
    kind, where, value = step
    if kind == "write":
        wire.write(where, value)
    elif kind == "read":
        return wire.read(where)
    else:
        wire.bring(bytes(range(value)))
    return 0


@given(before=st.lists(STEP, max_size=30), after=st.lists(STEP, max_size=30))
def test_loaded_uart_behaves_like_the_saved_one(before: Steps, after: Steps) -> None:
    saved = Wire()
    for step in before:
        take(saved, step)
    loaded = Wire()
    loaded.uart.load_state(saved.uart.state())
    loaded.line.level = saved.line.level
    loaded.waiting += saved.waiting
    saved.sent.clear()
    for step in after:
        assert take(loaded, step) == take(saved, step)
        assert (loaded.line.level, loaded.sent, loaded.waiting) == (saved.line.level, saved.sent, saved.waiting)
