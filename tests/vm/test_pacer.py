"""The thread that ends slices: in time, again until it worked, and not without being asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from lazymem.vm.pacer import SlicePacer

MILLISECOND = 1_000_000
FOREVER_NS = 3600 * 1000 * MILLISECOND


class Slice:
    """Counts how often its end was asked for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.times: list[float] = []

    def end(self) -> None:
        with self._changed:
            self.times.append(time.monotonic())
            self._changed.notify_all()

    def wait_asked(self, times: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.times) >= times, 60)


@pytest.fixture
def running() -> Slice:
    return Slice()


@pytest.fixture
def pacer(running: Slice) -> Iterator[SlicePacer]:
    pacer = SlicePacer(running.end)
    yield pacer
    pacer.close()


def test_asks_again_until_the_slice_has_ended(pacer: SlicePacer, running: Slice) -> None:
    pacer.arm(0)
    running.wait_asked(5)
    pacer.disarm()
    asked = len(running.times)
    pacer.arm(FOREVER_NS)
    assert len(running.times) == asked


def test_not_before_its_time(pacer: SlicePacer, running: Slice) -> None:
    armed = time.monotonic()
    pacer.arm(30 * MILLISECOND)
    running.wait_asked(1)
    assert running.times[0] - armed >= 0.03


def test_a_shorter_slice_behind_a_longer_one_ends_in_its_own_time(pacer: SlicePacer, running: Slice) -> None:
    pacer.arm(FOREVER_NS)
    pacer.disarm()
    pacer.arm(1 * MILLISECOND)
    running.wait_asked(1)


def test_a_disarmed_slice_is_left_alone(pacer: SlicePacer, running: Slice) -> None:
    for _ in range(100):
        pacer.arm(20 * MILLISECOND)
        pacer.disarm()
    asked = len(running.times)  # of one that a busy machine disarmed too late
    started = time.monotonic()
    pacer.arm(60 * MILLISECOND)
    running.wait_asked(asked + 1)
    assert running.times[asked] - started >= 0.06
