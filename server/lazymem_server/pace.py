"""How the answers to one host are made: compressed or not, in frames of how many pages. By what its link takes.

What counts is RAM a second. A client asks for as much as its link brings, so the rate at which answers are asked for
and taken is the link's (or the client's) whatever the sockets in between hold. Compression pays while the link is
slower than zstd; whether it does is tried out now and then, on an epoch of some MiB, and not guessed. Pure: the caller
brings the time. Any thread may call any method.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from lazymem.pages import PAGE_SIZE
from lazymem.wire.limits import MAX_FRAME_PAGES
from lazymem.wire.pagedata import FAST_LEVEL, THOROUGH_LEVEL

EPOCH_BYTES = 4 << 20
"""RAM that is sent in one way before the ways are compared: beyond what sockets hold, 16 ms of zstd."""

PAUSE_SECONDS = 0.25
"""A host that asked for nothing for so long begins a new epoch: what a pause shows is no rate."""

FAST_BYTES_PER_SECOND = 160e6
"""Beyond this one core's zstd would be the bottleneck, with little else to do."""

SLOW_BYTES_PER_SECOND = 50e6
"""Below this the more thorough level keeps up several times, and trying without compression is not worth it."""

WORTH = 0.9
"""Uncompressed answers cost both ends less: they win from this part of the other's rate on."""

MOST_EPOCHS_BETWEEN_TRIALS = 64

FRAME_SECONDS = 0.005
"""A frame of guessed pages is at most so long on the link: the receiver can use nothing of it before its end."""

FIRST_FRAME_PAGES = 64
LEAST_FRAME_PAGES = 16


@dataclass
class Pace:
    """One host's. `level` is what to compress bulk answers with, 0 for not at all."""

    level: int = FAST_LEVEL
    frame_pages: int = FIRST_FRAME_PAGES
    slow: bool = False
    """The link was seen to be slow: compressing pays for the smallest answers too."""
    _started_at: float = -1.0
    _last_at: float = -1.0
    _bytes: int = 0
    _other_rate: float | None = None
    _until_trial: int = 1
    _trial_pause: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def note(self, now: float, data_bytes: int) -> None:
        """So many bytes of pages that are not zero were asked for as bulk and are made into an answer now."""
        with self._lock:
            if now - self._last_at > PAUSE_SECONDS or self._started_at < 0:
                self._started_at, self._bytes = now, 0
            else:
                self._bytes += data_bytes
            self._last_at = now
            if self._bytes >= EPOCH_BYTES and now > self._started_at:
                rate = self._bytes / (now - self._started_at)
                self._started_at, self._bytes = now, 0
                self._decide(rate)

    def _decide(self, rate: float) -> None:
        """An epoch ended: go on, try the other way, or keep the better one of two that were tried."""
        self.frame_pages = max(LEAST_FRAME_PAGES, min(MAX_FRAME_PAGES, int(rate * FRAME_SECONDS) // PAGE_SIZE))
        self.slow = rate < SLOW_BYTES_PER_SECOND
        if self._other_rate is not None:
            self._compare(rate, self._other_rate)
        elif not self._worth_a_trial(rate):
            self._until_trial = self._trial_pause
        elif self._until_trial > 1:
            self._until_trial -= 1
        else:
            self._other_rate = rate
            self.level = 0 if self.level else FAST_LEVEL
            return
        if self.level:
            self.level = THOROUGH_LEVEL if self.slow else FAST_LEVEL

    def _worth_a_trial(self, rate: float) -> bool:
        return rate >= SLOW_BYTES_PER_SECOND if self.level else rate < FAST_BYTES_PER_SECOND

    def _compare(self, rate: float, other: float) -> None:
        """`rate` is what the trial gave, `other` what was before it."""
        self._other_rate = None
        raw, compressed = (other, rate) if self.level else (rate, other)
        before = 0 if self.level else FAST_LEVEL
        self.level = 0 if raw >= WORTH * compressed else FAST_LEVEL
        self._trial_pause = 1 if self.level != before else min(2 * self._trial_pause, MOST_EPOCHS_BETWEEN_TRIALS)
        self._until_trial = max(self._trial_pause, 4)
