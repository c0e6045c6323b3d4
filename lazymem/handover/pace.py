"""How much of a device state may be under way while its guest still runs. A window that follows the link.

The pass after the stop goes behind what is on its way then, for which the guest stands: in the kernel's buffers, ours,
and the queues of the link, which take as much as they are given. While the guest runs nobody waits for the state, so no
more of it is sent than keeps the link busy: the destination says what has arrived, and what may be under way is a
little more than what the link delivers in the shortest time from a sending to that word (as TCP BBR has it: Cardwell et
al., 2016). From the stop on there is no window.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from msgspec import Struct

LEAST_BYTES = 64 * 1024
"""At first, and at least: a link of 1 Gb/s takes half a millisecond for it."""

MOST_BYTES = 4 << 20
"""More than any state is before its last pass, on a link that would take it."""

_GAIN = 1.1
"""Of what the link holds: a tenth of it waits in a queue, and a rate that grows is followed."""

_FIRST_GAIN = 2.0
"""The same until the link is full once."""

_FULL_RATIO, _FULL_SECONDS = 1.25, 0.001
"""It is when a piece takes so much longer than at best. The seconds are for busy processors."""

_SILENT_SECONDS = 0.005
"""For busy processors, too, and for words that are told only now and then."""

_RATES = 16
"""The best of so many last ones: words come late, and then several at once."""


class _Piece(Struct, frozen=True):
    """`end`: how many bytes were sent with it; `arrived`: how many were known to have arrived then."""

    end: int
    sent_at: float
    arrived: int


class Window:
    """Pure. `now`: seconds of any one clock. Counts are of bytes as they go over the connection, from its begin."""

    def __init__(self) -> None:
        self.size = LEAST_BYTES
        self._sent = self._arrived = 0
        self._under_way: deque[_Piece] = deque()
        self._best = math.inf
        self._heard_at = -math.inf
        self._rates: deque[float] = deque(maxlen=_RATES)
        self._gain = _FIRST_GAIN

    @property
    def bytes_per_second(self) -> float:
        """The best of the last words; 0 before the first."""
        return max(self._rates, default=0.0)

    def has_room(self, count: int) -> bool:
        """For so many more. With nothing under way there is room for any."""
        under_way = self._sent - self._arrived
        return under_way <= 0 or under_way + count <= self.size

    def sent(self, count: int, now: float) -> None:
        self._sent += count
        self._under_way.append(_Piece(self._sent, now, self._arrived))

    def arrived(self, total: int, now: float) -> None:
        """So many are at the other side by now. What it cannot have yet is not believed."""
        self._heard_at = now
        self._arrived = max(self._arrived, min(total, self._sent))
        maybe_last: _Piece | None = None
        while self._under_way and self._under_way[0].end <= self._arrived:
            maybe_last = self._under_way.popleft()
        if maybe_last is not None and now > maybe_last.sent_at:
            self._follow(now - maybe_last.sent_at, self._arrived - maybe_last.arrived)

    def is_all_but_there(self, seconds: float, now: float) -> bool:
        """Whether no more is under way than the link delivers in the shortest time from a sending to its word, and in
        so many `seconds` more. Not as long as nothing is known of it, or where it has been silent since longer than two
        words take: it may be dead. Unless nothing is under way."""
        under_way = self._sent - self._arrived
        if under_way <= 0:
            return True
        is_silent = now - self._heard_at > 2 * self._best + _SILENT_SECONDS
        return bool(self._rates) and not is_silent and under_way <= max(self._rates) * (self._best + seconds)

    def _follow(self, took: float, delivered: int) -> None:
        self._best = min(self._best, took)
        self._rates.append(delivered / took)
        if took > self._best * _FULL_RATIO + _FULL_SECONDS:
            self._gain = _GAIN
        size = int(self._gain * self._best * self.bytes_per_second)
        self.size = max(LEAST_BYTES, min(MOST_BYTES, size))


class Pace:
    """One state's. One thread sends and waits in here, others say what has arrived, or `open` it. `waiting`: whether
    it waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window = Window()
        self._is_open = False
        self.waiting = 0
        self._changed = threading.Condition()

    def begin(self, count: int) -> bool:
        """Wait until so many more may be sent, which then count as sent. Whether it had to wait, for the link."""
        with self._changed:
            waits = not self._may_send(count)
            self.waiting += waits
            self._changed.wait_for(lambda: self._may_send(count))
            self.waiting -= waits
            self._window.sent(count, self._clock())
            return waits

    @property
    def bytes_per_second(self) -> float:
        """What the link carries, as far as that is known."""
        with self._changed:
            return self._window.bytes_per_second

    def _may_send(self, count: int) -> bool:
        return self._is_open or self._window.has_room(count)

    def arrived(self, total: int) -> None:
        """So many bytes of the connection are at the other side."""
        with self._changed:
            self._window.arrived(total, self._clock())
            self._changed.notify_all()

    def is_all_but_there(self, seconds: float) -> bool:
        """As `Window`'s."""
        with self._changed:
            return self._window.is_all_but_there(seconds, self._clock())

    def open(self) -> None:
        """From now on nobody waits."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
