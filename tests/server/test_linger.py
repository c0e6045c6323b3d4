"""Waiting on the processor for the next fault: whatever it does, it polls as asked, and one session at a time waits."""

from __future__ import annotations

import os
import threading

import pytest
from lazymem_server import linger
from lazymem_server.linger import Linger

READY = [(3, 1)]
PATIENCE_MS = 1000


class Clock:
    """Passes a microsecond a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Socket:
    """Something comes at the `comes_at`th look (from 0); one with patience sleeps for it. `looks`: what was asked."""

    def __init__(self, clock: Clock, comes_at: int) -> None:
        self._clock = clock
        self._comes_at = comes_at
        self.looks: list[int] = []

    def poll(self, timeout_ms: int) -> list[tuple[int, int]]:
        self.looks.append(timeout_ms)
        if timeout_ms:
            self._clock.now += 0.5
        return READY if timeout_ms or len(self.looks) > self._comes_at else []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(linger, "perf_counter", clock)
    return clock


@pytest.fixture
def lingering(clock: Clock) -> Linger:
    """One that found it worth it."""
    found = Linger(threading.Lock())
    assert found.poll(Socket(clock, 0).poll, PATIENCE_MS) == READY
    return found


def test_what_comes_soon_is_met_without_sleeping(lingering: Linger, clock: Clock) -> None:
    socket = Socket(clock, 20)
    assert lingering.poll(socket.poll, PATIENCE_MS) == READY
    assert set(socket.looks) == {0}


def test_what_does_not_come_is_slept_for_and_waited_for_less_and_less(lingering: Linger, clock: Clock) -> None:
    looks = []
    for _ in range(8):
        socket = Socket(clock, 1000)
        assert lingering.poll(socket.poll, PATIENCE_MS) == READY
        assert socket.looks[-1] == PATIENCE_MS
        looks.append(len(socket.looks))
    assert looks == sorted(looks, reverse=True)
    assert looks[-1] < 10 < looks[0]


def test_one_session_waits_at_a_time(lingering: Linger, clock: Clock) -> None:
    lingering._turn.acquire()
    socket = Socket(clock, 20)
    assert lingering.poll(socket.poll, PATIENCE_MS) == READY
    assert socket.looks == [PATIENCE_MS]
    lingering._turn.release()
    assert lingering.poll(Socket(clock, 20).poll, PATIENCE_MS) == READY
    assert lingering._turn.acquire(blocking=False), "it was given back"


def test_nobody_waits_where_others_want_the_processor(
    lingering: Linger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_aside() -> None:
        clock.now += 2 * linger.PUT_ASIDE_SECONDS

    monkeypatch.setattr(os, "sched_yield", put_aside)
    looks = []
    for _ in range(2):
        socket = Socket(clock, 20)
        assert lingering.poll(socket.poll, PATIENCE_MS) == READY
        looks.append(socket.looks)
        clock.now -= 0.5  # of sleep
    assert looks == [[0, PATIENCE_MS], [PATIENCE_MS]], "taken away once, and not tried again for a while"
    clock.now += linger.CROWDED_SECONDS
    socket = Socket(clock, 0)
    assert lingering.poll(socket.poll, PATIENCE_MS) == READY
    assert socket.looks == [0]
