"""One direction of a link, without a socket or a clock: delay, rate, order, queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.wire import Wire


def _arrivals(wire: Wire[int], until: float, step: float = 0.0001) -> dict[int, float]:
    """When each thing arrived, seen by somebody who looks every `step`."""
    found: dict[int, float] = {}
    now = 0.0
    while now < until:
        while (what := wire.arrived(now)) is not None:
            found[what] = now
        now += step
    return found


def test_a_lone_byte_takes_the_delay_and_no_queue() -> None:
    wire: Wire[int] = Wire(1e6, 0.010)
    wire.put(0.0, 1, 7)
    assert wire.arrived(0.0100) is None
    assert wire.arrived(0.0101) == 7
    assert wire.arrived(1.0) is None


def test_what_is_put_in_at_once_comes_out_at_the_rate() -> None:
    wire: Wire[int] = Wire(1e6, 0.010)
    for number in range(10):
        wire.put(0.0, 1000, number)
    found = _arrivals(wire, 1.0)
    assert list(found) == list(range(10))
    assert found[9] == pytest.approx(0.010 + 10 * 0.001, abs=0.0002)
    assert found[4] == pytest.approx(0.010 + 5 * 0.001, abs=0.0002)


def test_a_caller_who_is_late_loses_no_rate_while_something_waits() -> None:
    wire: Wire[int] = Wire(1e6, 0.0)
    wire.put(0.0, 3000, 1)
    wire.put(0.002, 1000, 2)  # the wire is busy until 0.003, whenever this is said
    assert wire.arrived(0.0039) == 1
    assert wire.arrived(0.0039) is None
    assert wire.arrived(0.0041) == 2


def test_the_queue_is_two_bandwidth_delay_products_and_empties_at_the_rate() -> None:
    wire: Wire[int] = Wire(12.5e6, 0.010)  # 100 Mb/s, 20 ms of round trip
    assert wire.queue_bytes == 2 * 12.5e6 * 0.020
    wire.put(0.0, 100_000, 1)
    wire.put(0.0, 100_000, 2)
    assert wire.room(0.0) == wire.queue_bytes - 200_000
    assert wire.room(0.008) == pytest.approx(wire.queue_bytes - 100_000, abs=1)
    assert wire.room(1.0) == wire.queue_bytes


def test_the_next_event_is_an_arrival_or_room_in_a_full_queue() -> None:
    wire: Wire[int] = Wire(12.5e6, 0.010)
    assert wire.next_event(0.0) == float("inf")
    wire.put(0.0, wire.piece_bytes, 1)
    assert wire.next_event(0.0) == pytest.approx(wire.piece_bytes / 12.5e6 + 0.010)
    wire.put(0.0, wire.queue_bytes - wire.piece_bytes, 2)
    room_at = wire.next_event(0.0)
    assert room_at == pytest.approx(wire.piece_bytes / 12.5e6)
    assert wire.room(0.0) < wire.piece_bytes
    assert wire.room(room_at + 1e-9) == pytest.approx(wire.piece_bytes, abs=1)
    assert wire.next_event(room_at) == pytest.approx(wire.piece_bytes / 12.5e6 + 0.010)  # the first one arrives


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(0, 60_000)), min_size=1, max_size=40))
def test_nothing_overtakes_and_nothing_beats_the_rate(puts: list[tuple[float, int]]) -> None:
    wire: Wire[int] = Wire(1e6, 0.005)
    now, total, first = 0.0, 0, puts[0][0]
    for number, (pause, length) in enumerate(puts):
        now += pause
        total += length
        wire.put(now, length, number)
    order = []
    while (what := wire.arrived(first + total / 1e6 + 0.005 - 1e-6)) is not None:
        order.append(what)
    assert len(order) < len(puts)
    while (what := wire.arrived(1e9)) is not None:
        order.append(what)
    assert order == list(range(len(puts)))
    assert wire.carried_bytes == total
