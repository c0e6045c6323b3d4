"""How much may be guessed at a time, so that a demand waits behind at most one bandwidth-delay product of it. Pure.

The window is twice the product of the best round trip and the delivery rate: what is out beyond one product stands in
queues on the way, and that is what a demand can meet there (rule 5). While the link is not full a rate sample is about
window / round trip, so the window doubles each round trip until the link is.

Source of the rate samples and the gain: Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 2016.
"""

from __future__ import annotations

import math

from lazymem.pages import PAGE_SIZE

MIN_WINDOW_PAGES = 16
"""64 KiB: 52 ms of a 10 Mb/s line, and enough for a rate to be seen."""

MAX_WINDOW_PAGES = 2048
"""8 MiB: twice the product of 1 Gb/s and 32 ms. More would be memory for links that no guest should be resumed over."""

MAX_PIECE_PAGES = 64
"""256 KiB a request: verified in one go in a quarter of a millisecond, and 2 ms of a gigabit link."""

MIN_QUEUE_SECONDS = 0.002
"""Where the round trip is shorter than that, the rate is the two processors', and this keeps both of them busy."""

FLOOR_PAGES = 64
FLOOR_SECONDS = 0.02
"""Busy processors answer later than the best round trip and look like a slow link; what they get in 20 ms, up to 256
KiB (two products of 1 Gb/s and 1 ms), is out in any case, or the window would shrink for no gain."""

MIN_SHARE = 0.25
"""Of a page's bytes that cross the wire. Where memory compresses better, more pages could be out; but what comes next
may not compress at all, and then the queue is longer by the inverse of this until the window has noticed."""

SHARE_WEIGHT = 0.25
GAIN = 2.0
RATE_DECAY = 0.97
"""Each sample: a slower link is believed after some thirty of them."""


class BackgroundWindow:
    """Fed with what was delivered; says how many pages may be out."""

    def __init__(self) -> None:
        self._rate = 0.0  # wire bytes a second
        self._share = 1.0  # wire bytes a byte of pages, smoothed
        self._pages = MIN_WINDOW_PAGES * 2

    @property
    def pages(self) -> int:
        return self._pages

    @property
    def piece_pages(self) -> int:
        """Size of one request: three in a window."""
        return min(MAX_PIECE_PAGES, self._pages // 3)

    def note(
        self, delivered_bytes: int, delivered_pages: int, elapsed_seconds: float, best_round_trip_seconds: float
    ) -> None:
        """A guess is here: so much came over the link, of anything, between its sending and now."""
        if not elapsed_seconds > 0 or not math.isfinite(best_round_trip_seconds):
            return
        if delivered_pages:
            share = delivered_bytes / (delivered_pages * PAGE_SIZE)
            self._share += SHARE_WEIGHT * (min(1.0, max(MIN_SHARE, share)) - self._share)
        self._rate = max(self._rate * RATE_DECAY, delivered_bytes / elapsed_seconds)
        pages_a_second = self._rate / (PAGE_SIZE * self._share)
        wanted = pages_a_second * max(GAIN * best_round_trip_seconds, MIN_QUEUE_SECONDS)
        floor = min(FLOOR_PAGES, pages_a_second * FLOOR_SECONDS)
        self._pages = int(min(MAX_WINDOW_PAGES, max(MIN_WINDOW_PAGES, wanted, floor)))
