"""When a client counts as one that does not take its answers: a socket that is a function, and a clock of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
from lazymem_server import outlet
from lazymem_server.counters import Counters
from lazymem_server.ending import SessionEnd
from lazymem_server.limits import ServerLimits
from lazymem_server.outlet import Outlet
from lazymem_server.output import Lane, Piece

LIMITS = ServerLimits(send_seconds=10, send_bytes=1000)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(outlet, "time", SimpleNamespace(monotonic=made.monotonic))
    return made


def an_outlet(take: Callable[[int], int]) -> Outlet:
    """With 100 frames of 100 bytes to send, over a socket that takes `take(length)` of so many bytes."""

    def writev(fd: int, pieces: Sequence[Piece]) -> int:
        return take(sum(map(len, pieces)))

    made = Outlet(-1, LIMITS, Counters(), writev)
    for _ in range(100):
        made.put((bytes(100),), Lane.DEMAND)
    return made


def seconds_until_dropped(made: Outlet, clock: Clock, step: float, most_bytes: int = 1000) -> float | None:
    """None: it never is."""
    began = clock.now
    while made.unsent_bytes:
        try:
            made.flush(most_bytes)
            made.check_pace(clock.now)
        except SessionEnd:
            return clock.now - began
        clock.now += step
    return None


def test_a_socket_that_takes_nothing(clock: Clock) -> None:
    assert seconds_until_dropped(an_outlet(lambda length: 0), clock, 1.0) == 10.0


def test_one_that_takes_a_little_now_and_then(clock: Clock) -> None:
    assert seconds_until_dropped(an_outlet(lambda length: 50), clock, 1.0) == 10.0


def test_one_that_takes_all_at_first(clock: Clock) -> None:
    """More waits, and its time begins with the last that it took."""
    takes = iter([1000, 1000, 1000, *[0] * 100])
    assert seconds_until_dropped(an_outlet(lambda length: next(takes)), clock, 1.0) == 12.0


@pytest.mark.parametrize("step", [1.0, 100.0])
def test_one_that_takes_all_that_it_gets(clock: Clock, step: float) -> None:
    """However seldom, and however little that is: a server that stood still has no slow clients for that."""
    assert seconds_until_dropped(an_outlet(lambda length: length), clock, step, most_bytes=200) is None
