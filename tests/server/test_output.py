"""The lanes in which frames wait for one client."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st
from lazymem_server.output import MOST_PIECES, Lane, Output


def taken(output: Output, most: int) -> bytes:
    """What is sent next, as if the socket took all of it."""
    data = b"".join(output.pieces(most))
    output.sent(len(data))
    return data


def test_the_urgent_lane_goes_first_and_unsent_counts_until_the_socket_took_it() -> None:
    output = Output()
    output.put((b"b" * 90, memoryview(b"b" * 10)), Lane.BACKGROUND)
    output.put((b"d" * 10,), Lane.DEMAND)
    output.put((b"e" * 10,), Lane.DEMAND)
    output.put((b"c",), Lane.CONTROL)
    assert output.unsent_bytes == 121
    assert b"".join(output.pieces(15)) == b"c" + b"d" * 10
    assert output.unsent_bytes == 121
    assert output.sent(11)
    assert output.unsent_bytes == 110
    assert taken(output, 64) == b"e" * 10
    assert taken(output, 64) == b"b" * 100, "one frame at least, however large"
    assert output.unsent_bytes == 0
    assert not output.pieces(64)


def test_nothing_comes_between_the_parts_of_a_frame() -> None:
    output = Output()
    output.put((b"12", b"345", memoryview(b"678")), Lane.BACKGROUND)
    assert b"".join(output.pieces(1)) == b"12345678"
    assert not output.sent(3)
    output.put((b"urgent",), Lane.CONTROL)
    assert b"".join(output.pieces(1)) == b"45678"
    assert output.sent(5)
    assert taken(output, 1) == b"urgent"


@given(st.lists(st.tuples(st.sampled_from(Lane), st.lists(st.integers(0, 40), min_size=1, max_size=3)), max_size=30))
def test_whatever_the_socket_takes_each_lane_arrives_in_order(frames: list[tuple[Lane, list[int]]]) -> None:
    output = Output()
    expected: dict[Lane, bytes] = dict.fromkeys(Lane, b"")
    for lane, sizes in frames:
        parts = tuple(bytes([97 + lane]) * size for size in sizes)
        output.put(parts, lane)
        expected[lane] += b"".join(parts)
    arrived = b""
    while output.unsent_bytes:
        data = b"".join(output.pieces(50))
        assert data
        count = 1 + len(data) // 3
        arrived += data[:count]
        output.sent(count)
    assert arrived == b"".join(expected.values())


def test_no_more_pieces_than_a_system_call_takes() -> None:
    output = Output()
    for _ in range(3 * MOST_PIECES):
        output.put((b"p",), Lane.CONTROL)
    assert len(output.pieces(1 << 20)) <= os.sysconf("SC_IOV_MAX") // 2
