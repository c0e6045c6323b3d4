"""The window that a device state keeps to while its guest runs: by a link that is reckoned, and between threads."""

from __future__ import annotations

import threading

import pytest
from msgspec import Struct, structs

from lazymem.handover.pace import LEAST_BYTES, MOST_BYTES, Pace, Window

PIECE_BYTES = 32 * 1024
ALL_BYTES = 8 << 20


class Link(Struct):
    """One that carries a piece after the other: `rate` in bytes a second, `way` in seconds, there or back; what has
    arrived is told after `late` seconds more. `queues`: for how long each piece waited for the ones before it."""

    rate: float
    way: float
    late: float = 0.0
    free_at: float = 0.0
    queues: list[float] = []

    def told_at(self, now: float, count: int) -> float:
        """Sent at `now`, when its sender hears that it has arrived."""
        self.queues.append(max(0.0, self.free_at - now))
        self.free_at = max(self.free_at, now) + count / self.rate
        return self.free_at + 2 * self.way + self.late


def _sent_all(link: Link) -> float:
    """Seconds, by a sender that has more whenever there is room."""
    window, now, sent, told = Window(), 0.0, 0, 0
    news: list[tuple[float, int]] = []
    while told < ALL_BYTES:
        while sent < ALL_BYTES and window.has_room(PIECE_BYTES):
            sent += PIECE_BYTES
            window.sent(PIECE_BYTES, now)
            news.append((link.told_at(now, PIECE_BYTES), sent))
        now, told = news.pop(0)
        window.arrived(told, now)
        assert LEAST_BYTES <= window.size <= MOST_BYTES
    return now


def test_what_the_link_carries_is_the_best_of_the_last_words() -> None:
    clock = iter([0.0, 0.5, 1.0, 3.0])
    pace = Pace(lambda: next(clock))
    assert pace.bytes_per_second == 0
    for total in (1000, 2000):
        pace.begin(1000)
        pace.arrived(total)
    assert pace.bytes_per_second == 2000


@pytest.mark.parametrize(
    ("link", "longest"),
    [
        (Link(100e6 / 8, 0.010), 0.003),
        (Link(1e9 / 8, 0.0005, late=0.001), 0.001),
        (Link(10e6 / 8, 0.050), 0.010),
        (Link(1e9 / 8, 0.020), 0.015),
    ],
)
def test_the_link_is_busy_and_its_queue_short(link: Link, longest: float) -> None:
    link = structs.replace(link, queues=[])  # a parameter is one object, however often its test runs
    took = _sent_all(link)
    assert took < 1.5 * (ALL_BYTES / link.rate + 10 * link.way)
    assert max(link.queues[len(link.queues) // 2 :]) < longest, "for what has to go when the guest stands"


def test_with_nothing_under_way_there_is_room_for_any_piece() -> None:
    """Of an emulator whose pieces are larger than what the link holds."""
    window = Window()
    assert window.has_room(10 * MOST_BYTES)
    window.sent(LEAST_BYTES, 0.0)
    assert not window.has_room(1)
    window.arrived(LEAST_BYTES, 0.1)
    assert window.has_room(10 * MOST_BYTES)


def test_a_destination_that_has_more_than_was_sent_is_not_believed() -> None:
    window = Window()
    window.sent(PIECE_BYTES, 0.0)
    window.arrived(1 << 62, 0.1)
    window.arrived(-1, 0.2)
    window.sent(LEAST_BYTES + PIECE_BYTES, 0.3)
    assert not window.has_room(PIECE_BYTES)


@pytest.mark.parametrize("opened", [True, False])
def test_who_waits_goes_on_and_is_told_that_it_had_to(*, opened: bool) -> None:
    """Once there is room, or the guest stands."""
    seen = threading.Event()

    class Told(Pace):
        def _may_send(self, count: int) -> bool:
            may = super()._may_send(count)
            if not may:
                seen.set()
            return may

    pace = Told()
    assert not pace.begin(LEAST_BYTES)
    waited: list[bool] = []
    thread = threading.Thread(target=lambda: waited.append(pace.begin(PIECE_BYTES)))
    thread.start()
    assert seen.wait(30)
    if opened:
        pace.open()
    else:
        pace.arrived(LEAST_BYTES)
    thread.join(30)
    assert waited == [True]
    assert not opened or not pace.begin(MOST_BYTES), "nobody waits any more"


@pytest.mark.parametrize("seconds", [0.0, 0.003])
@pytest.mark.parametrize(
    "link", [Link(100e6 / 8, 0.010), Link(1e9 / 8, 0.0005), Link(10e6 / 8, 0.050), Link(1e9 / 8, 0.003)]
)
def test_a_word_behind_the_state_is_there_with_its_end(link: Link, seconds: float) -> None:
    """It is said when that may be, takes so many seconds to be written first, and the way."""
    link = structs.replace(link, queues=[])
    window, news, sent = Window(), [], 0
    for _ in range(ALL_BYTES // PIECE_BYTES):  # as fast as it can, since the guest stands
        sent += PIECE_BYTES
        window.sent(PIECE_BYTES, 0.0)
        news.append((link.told_at(0.0, PIECE_BYTES), sent))
    end = news[-1][0] - link.way
    now = 0.0
    while not window.is_all_but_there(seconds, now):
        now, told = news.pop(0)
        window.arrived(told, now)
    said = now + seconds + link.way
    assert abs(said - end) < 0.2 * (2 * link.way + seconds) + 2 * PIECE_BYTES / link.rate


def test_a_link_of_which_nothing_is_known_has_all_or_nothing() -> None:
    window = Window()
    assert window.is_all_but_there(0.0, 0.0), "nothing was sent"
    window.sent(PIECE_BYTES, 0.0)
    assert not window.is_all_but_there(1000.0, 0.0)


def test_of_a_link_that_is_silent_it_is_not_taken_that_it_delivers() -> None:
    """It may have died before the guest stood, which then goes on here as soon as that is known."""
    window = Window()
    window.sent(10 * PIECE_BYTES, 0.0)
    window.arrived(10 * PIECE_BYTES, 0.02)
    window.sent(PIECE_BYTES, 0.06)
    assert window.is_all_but_there(0.001, 0.06)
    assert not window.is_all_but_there(0.001, 0.08)
    window.arrived(11 * PIECE_BYTES, 0.09)
    assert window.is_all_but_there(0.001, 9.0), "all is told to be there"
