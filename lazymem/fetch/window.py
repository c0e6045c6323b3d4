"""How much may be guessed at a time, so that a demand waits behind at most one bandwidth-delay product of it. Pure.

The window is twice the product of the best round trip and the delivery rate, both of bytes on the wire: what is out
beyond one product stands in queues on the way, and that is what a demand can meet there (rule 5). While the link is
not full a rate sample is about window / round trip, so the window doubles each round trip until the link is.

The first demand after a pause meets such a queue; while they go on, the window is smaller.

The rate is the largest of the last round trips' samples. A sample that something other than the link has bounded
(zeros cross the wire as next to nothing; an answer that met no queue says that there was room for more) may raise
it and is no reason to forget an earlier one.

Source of the rate samples, the filter and the gain: Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM
Queue 2016.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from lazymem.pages import PAGE_SIZE

MIN_WINDOW_PAGES = 16
"""64 KiB: 52 ms of a 10 Mb/s line, and enough for a rate to be seen."""

MIN_DEMANDED_PAGES = 4
"""While somebody demands: 13 ms of that line. A window that is too small makes no slow link (`note`: not full)."""

MAX_WINDOW_PAGES = 2048
"""8 MiB: twice the product of 1 Gb/s and 32 ms. More would be memory for links that no guest should be resumed over."""

MAX_PIECE_PAGES = 256
"""1 MiB a request: a leaf of digests. Windows that have three of them are those of a link that sends one in 8 ms."""

GAIN = 2.0
MIN_QUEUE_SECONDS = 0.008
"""Where half of that is more than a round trip, the rate is the two processors', and this keeps both of them busy."""

FLOOR_SECONDS = 0.02
FLOOR_PAGES = 256
"""Busy processors answer later than the best round trip and look like a slow link; what they get in 20 ms, up to 1 MiB
(8 ms of 1 Gb/s), is out in any case, or the window would shrink and the rate with it, for no gain."""


class Demanded(NamedTuple):
    """How much smaller it is while somebody demands: in place of `GAIN`, `MIN_QUEUE_SECONDS` and `FLOOR_PAGES`."""

    gain: float
    min_queue_seconds: float
    floor_pages: int


BESIDE_DEMANDS = Demanded(1.5, 0.002, 64)
"""Of guesses on the demands' own behalf, with a link that others leave to them: half a product in queues, for a little
of the rate."""

BEHIND_DEMANDS = Demanded(1.0, 0.001, 32)
"""Of guesses that nobody waits for: no queue that lasts. A fill loses some of the link to pauses while somebody demands
pages that are far apart."""

SLOW_SECONDS = 0.005
"""Round trips from here on see smaller pieces, so that less of the window is of pieces that are nearly here."""

MIN_SHARE = 0.25
"""Of a page's bytes that cross the wire. Where memory compresses better, more pages could be out; but what comes next
may not compress at all, and then the queue is longer by the inverse of this until the window has noticed."""

MAX_SHARE = 2.0
"""A page that does not compress, and brings a leaf of digests along."""

SHARE_WEIGHT = 0.25

DEMANDED_SHARES = 16
"""While somebody demands, the largest share of so many last answers counts: RAM is text here and noise there, and a
window that was right for the text is a queue of several products where the noise begins."""

QUEUED = 1.25
"""An answer that took so many best round trips has met a queue: the link, or a processor, was all taken."""

MEMORY_ROUND_TRIPS = 10
MEMORY_SECONDS = 0.2
MEMORY_SAMPLES = 10
"""A slower link is believed after once or twice as long, and as many samples that something full has bounded."""


class BackgroundWindow:
    """Fed with what was delivered; says how many pages may be out."""

    def __init__(self, assumed_bytes_per_second: float = 0.0) -> None:
        """`assumed_bytes_per_second`: as if a first sample had said so. 0: nothing is known of the link."""
        self.when_demanded = BESIDE_DEMANDS
        """How much smaller it is then; may be set before each `note`."""
        self._best_now = assumed_bytes_per_second  # wire bytes a second: largest sample since `_since`
        self._best_before = 0.0  # and in the span before
        self._since = -math.inf
        self._samples = 0
        self._share = 1.0  # wire bytes a byte of pages, smoothed
        self._shares: deque[float] = deque(maxlen=DEMANDED_SHARES)
        self._round_trip = 0.0
        assumed_pages = int(assumed_bytes_per_second * MIN_QUEUE_SECONDS / PAGE_SIZE)
        self._pages = min(MAX_WINDOW_PAGES, max(MIN_WINDOW_PAGES * 2, assumed_pages))

    @property
    def pages(self) -> int:
        return self._pages

    @property
    def knows_link(self) -> bool:
        """Whether something was delivered, or `suppose` has told."""
        return self._round_trip > 0

    def suppose(self, bytes_per_second: float, best_round_trip_seconds: float) -> None:
        """Another window's rate on the same link, before anything was delivered here: else the first answers, of a
        window that is a fraction of the link, would say that the link is as slow as that."""
        self._best_now = max(self._best_now, bytes_per_second)
        self._round_trip = best_round_trip_seconds
        gain, least, _ = self.when_demanded
        wanted = self._best_now / PAGE_SIZE * max(gain * best_round_trip_seconds, least)
        self._pages = int(min(MAX_WINDOW_PAGES, max(MIN_DEMANDED_PAGES, wanted)))

    @property
    def rate_bytes_per_second(self) -> float:
        """Of the wire, as seen lately; 0 before anything was."""
        return max(self._best_before, self._best_now)

    @property
    def piece_pages(self) -> int:
        """Size of one request: three in a window, or more where a round trip has time for their processors' share."""
        return max(1, min(MAX_PIECE_PAGES, self._pages // (3 if self._round_trip < SLOW_SECONDS else 8)))

    def note(
        self,
        delivered_bytes: int,
        delivered_pages: int,
        elapsed_seconds: float,
        best_round_trip_seconds: float,
        now_seconds: float,
        demanded: bool = False,
    ) -> None:
        """A guess is here: so much came over the link, of anything, between its sending and now.

        `demanded`: somebody waits for pages, or did a moment ago.
        """
        if not elapsed_seconds > 0 or not math.isfinite(best_round_trip_seconds):
            return
        self._round_trip = best_round_trip_seconds
        full = elapsed_seconds > QUEUED * best_round_trip_seconds
        if delivered_pages:
            share = delivered_bytes / (delivered_pages * PAGE_SIZE)
            full = full and share >= MIN_SHARE
            self._shares.append(min(MAX_SHARE, max(MIN_SHARE, share)))
            self._share += SHARE_WEIGHT * (self._shares[-1] - self._share)
        self._note_rate(delivered_bytes / elapsed_seconds, full, best_round_trip_seconds, now_seconds)
        rate = self.rate_bytes_per_second
        share = max(self._share, *self._shares) if demanded and self._shares else self._share
        pages_a_second = rate / (PAGE_SIZE * share)
        gain, least, floor_pages = self.when_demanded if demanded else (GAIN, MIN_QUEUE_SECONDS, FLOOR_PAGES)
        wanted = pages_a_second * max(gain * best_round_trip_seconds, least)
        floor = min(floor_pages, pages_a_second * FLOOR_SECONDS)
        least_pages = MIN_DEMANDED_PAGES if demanded else MIN_WINDOW_PAGES
        self._pages = int(min(MAX_WINDOW_PAGES, max(least_pages, wanted, floor)))

    def _note_rate(self, rate: float, full: bool, best_round_trip: float, now: float) -> None:
        """Samples that were not `full` raise the maximum and let no time pass."""
        self._best_now = max(self._best_now, rate)
        if not full:
            return
        self._samples += 1
        over = now - self._since >= max(MEMORY_SECONDS, MEMORY_ROUND_TRIPS * best_round_trip)
        if over and self._samples >= MEMORY_SAMPLES:
            self._best_before, self._best_now = self._best_now, rate
            self._since = now
            self._samples = 0
