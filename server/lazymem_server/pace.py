"""How the answers to one host are made: compressed or not, in frames of how many pages. By what its link takes.

What counts is RAM a second. A client asks for as much as its link brings, so the rate at which answers are asked for
and taken is the link's (or the client's) whatever the sockets in between hold. Compression pays where the link is
slower than zstd, on this machine, now; whether it does is tried out on an epoch now and then, not guessed. Pure: the
caller brings the time. Any thread may call any method.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from lazymem.pages import PAGE_SIZE
from lazymem.wire.limits import MAX_FRAME_PAGES
from lazymem.wire.pagedata import FAST_LEVEL, THOROUGH_LEVEL

EPOCH_BYTES = 2 << 20
EPOCH_SECONDS = 0.05
"""An epoch has both, so that neither a socket's room nor a neighbour's turn on the processor makes its rate."""

PAUSE_SECONDS = 1.0
"""A host that asked for nothing for so long begins a new epoch: what a pause shows is no rate."""

SLOW_WIRE_BYTES_PER_SECOND = 20e6
"""Below this zstd keeps up: compressed without trials, whose every second shows on such a link."""

MAKING_SHARE = 0.5
"""Whoever makes answers for more than this part of the time, on a busy machine, is slow itself and not the link."""

FAST_BYTES_PER_SECOND = 160e6
"""Beyond this one core's zstd would be the bottleneck, with little else to do: not worth a trial."""

WORTH = 0.9
"""Uncompressed answers cost both ends less: they win from this part of the other's rate on."""

SMOOTHING = 0.3
"""Weight of the last epoch in a rate: one MiB of RAM is text, the next one noise."""

SLOW_EPOCHS = 4
"""So many slow ones in a row make a slow link: a client that pauses to think is none."""

LEAST_EPOCHS_BETWEEN_TRIALS = 4
MOST_EPOCHS_BETWEEN_TRIALS = 64

FRAME_SECONDS = 0.01
"""A frame is at most so long on the link, though nothing of it compresses: nothing overtakes it there, and the receiver
can use nothing of it before its end."""

FIRST_FRAME_PAGES = 64

MOST_UNSENT_BYTES = 64 * 1024
LEAST_UNSENT_BYTES = 4 * 1024
UNSENT_SECONDS = 0.01
"""What is handed to the socket at a time, and may be unsent in the kernel, which nothing overtakes either; on a faster
link the first of these, which is 0.5 ms at 1 Gb/s."""


def frame_pages_at(wire_bytes_per_second: float) -> int:
    """Of a frame on a link of that rate: `FRAME_SECONDS` long at most, but one page at least."""
    return max(1, min(MAX_FRAME_PAGES, int(wire_bytes_per_second * FRAME_SECONDS) // PAGE_SIZE))


def unsent_bytes_at(wire_bytes_per_second: float) -> int:
    """What may be in the kernel beyond what a link of that rate has room for: a power of two, for few changes."""
    room = int(min(MOST_UNSENT_BYTES, max(LEAST_UNSENT_BYTES, wire_bytes_per_second * UNSENT_SECONDS)))
    return 1 << (room.bit_length() - 1)


class _Seen(NamedTuple):
    """Bytes a second of pages and on the wire; `making_share`: of the time, spent on making answers."""

    rate: float
    wire_rate: float
    making_share: float


@dataclass
class Pace:
    """One host's. `level` is what to compress bulk answers with, 0 for not at all."""

    level: int = FAST_LEVEL
    frame_pages: int = FIRST_FRAME_PAGES
    unsent_bytes: int = MOST_UNSENT_BYTES
    _supposed: bool = True
    _lately: _Seen = field(default_factory=lambda: _Seen(0.0, 0.0, 0.0))
    _slow_epochs: int = 0
    _started_at: float = -1.0
    _last_at: float = -1.0
    _bytes: int = 0
    _wire_bytes: int = 0
    _demanded_bytes: int = 0
    _carried: float = 0.0
    _making: float = 0.0
    _rate: float = 0.0
    _maybe_other_rate: float | None = None
    _until_trial: int = 1
    _trial_pause: int = LEAST_EPOCHS_BETWEEN_TRIALS
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of_this_host(cls) -> Pace:
        """For a peer on the same host, with no link in between unless something relays."""
        return cls(level=0, frame_pages=MAX_FRAME_PAGES)

    @property
    def slow(self) -> bool:
        """The link is slow: the thorough level keeps up, and compressing pays for demands and the smallest answers."""
        return self._slow_epochs >= SLOW_EPOCHS

    def note(self, now: float, data_bytes: int, wire_bytes: int, making_seconds: float) -> None:
        """An answer to a guess was made.

        Args:
            data_bytes: of its pages that are not zero; `wire_bytes`: what they are on the wire.
            making_seconds: how long it took to read and compress them.
        """
        with self._lock:
            if now - self._last_at > PAUSE_SECONDS or self._started_at < 0:
                self._break_off()
                self._begin(now)
            else:
                self._bytes += data_bytes
                self._wire_bytes += wire_bytes
                self._making += making_seconds
            self._last_at = now
            elapsed = now - self._started_at
            if self._bytes >= EPOCH_BYTES and elapsed >= EPOCH_SECONDS:
                self._fit_frames((self._wire_bytes + self._demanded_bytes) / elapsed)
                self._decide(self._bytes / elapsed, self._wire_bytes / elapsed, self._making / elapsed)
                self._supposed = False
                self._begin(now)
            elif self._supposed and elapsed >= EPOCH_SECONDS:
                self._doubt(self._wire_bytes / elapsed)

    def note_demand(self, wire_bytes: int) -> None:
        """An answer to a demand was made, of so many bytes. The link carries it beside the guesses: a client that lets
        few of those pass while it demands is not on a slow link."""
        with self._lock:
            self._demanded_bytes += wire_bytes

    def _doubt(self, wire_rate: float) -> None:
        """Nobody knows more of the link than a supposition: a slow one need not fill an epoch first."""
        self._supposed = False
        if wire_rate < SLOW_WIRE_BYTES_PER_SECOND and not self.level:
            self.level, self.frame_pages = FAST_LEVEL, FIRST_FRAME_PAGES

    def _break_off(self) -> None:
        """End a trial without a result: as it was before it."""
        if self._maybe_other_rate is not None:
            self._turn_to(0 if self.level else FAST_LEVEL, self._maybe_other_rate)

    def _begin(self, now: float) -> None:
        self._started_at, self._bytes, self._wire_bytes, self._making = now, 0, 0, 0.0
        self._demanded_bytes = 0

    def _turn_to(self, level: int, rate: float) -> None:
        """Go on in this way, which had that rate, until the next trial."""
        self.level, self._rate = level, rate
        self._maybe_other_rate = None
        self._until_trial = self._trial_pause

    def _decide(self, rate: float, wire_rate: float, making_share: float) -> None:
        """An epoch ended: go on, try the other way, or keep the better one of two that were tried."""
        self._smooth(rate, wire_rate, making_share)
        if self._lately.wire_rate < SLOW_WIRE_BYTES_PER_SECOND and self._lately.making_share < MAKING_SHARE:
            if self._maybe_other_rate is not None and not self.level:
                self._lengthen_pause()
            self._slow_epochs += 1
            self._turn_to(THOROUGH_LEVEL if self.slow else FAST_LEVEL, rate)
            return
        if self._slow_epochs:
            self._slow_epochs = 0
            self.level = min(self.level, FAST_LEVEL)
        if self._maybe_other_rate is not None:
            self._compare(rate, self._maybe_other_rate)
            return
        self._rate += (rate - self._rate) * (SMOOTHING if self._rate else 1.0)
        if self.level == 0 and rate >= FAST_BYTES_PER_SECOND:
            return
        self._until_trial -= 1
        if self._until_trial <= 0:
            self._maybe_other_rate = self._rate
            self.level = 0 if self.level else FAST_LEVEL

    def _fit_frames(self, carried: float) -> None:
        """`carried`: bytes of all answers on the wire a second; smoothed as the guesses' rates are."""
        self._carried += (carried - self._carried) * (SMOOTHING if self._carried else 1.0)
        self.frame_pages = frame_pages_at(self._carried)
        self.unsent_bytes = unsent_bytes_at(self._carried)

    def _smooth(self, rate: float, wire_rate: float, making_share: float) -> None:
        """What single epochs of a slow link show is where its queues fill and drain, by a factor of three."""
        now = (rate, wire_rate, making_share)
        before = self._lately if self._lately.rate else _Seen(*now)
        self._lately = _Seen(*(old + (new - old) * SMOOTHING for old, new in zip(before, now, strict=True)))

    def _compare(self, rate: float, other: float) -> None:
        """`rate` is what the trial gave, `other` what was before it."""
        tried, before = (self.level, 0 if self.level else FAST_LEVEL)
        won = rate * WORTH > other if tried else rate >= WORTH * other
        if won:
            self._trial_pause = LEAST_EPOCHS_BETWEEN_TRIALS
        else:
            self._lengthen_pause()
        self._turn_to(tried if won else before, rate if won else other)

    def _lengthen_pause(self) -> None:
        self._trial_pause = min(2 * self._trial_pause, MOST_EPOCHS_BETWEEN_TRIALS)
