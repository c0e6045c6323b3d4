"""When guesses of another process than the demands' give way to them. Pure: the caller brings the times.

A link has one queue, whoever fills it. A demand beside a fill waits behind up to as many guessed pages as fill it, and
so do the daemon's own guesses around it, which the guest is likely to need next. So for a while after a demand the fill
stands still, but for a trickle. That costs it little: while a guest goes on demanding, the guesses around its demands
fill the link, and when it does not, the fill has the link for itself.
"""

from __future__ import annotations

import math

SHORTEST_ROUND_TRIP_SECONDS = 0.0005
"""Of a link on which guesses and demands meet. Within a host they meet at the processors only: niceness is for that."""

SECONDS = 0.025
ROUND_TRIPS = 2
"""How long after a demand, the longer of both: the next one of a guest that works comes within."""

TRICKLE_SECONDS = 0.05
"""One request in so long passes all the same: a guest that demands without end must not keep the rest from coming."""

FIRST_TRICKLE_SECONDS = 0.3
PATIENCE_SECONDS = 10.0
"""But for so long a guest that begins to demand has nearly all of the link: a resume is over by then as a rule. (At 20
ms, 100 Mb/s each request of the trickle is 10 ms of the link that a demand may meet.)"""

PAUSE_SECONDS = 1.0
"""Without demands, and what comes then is a new beginning."""

TRICKLE_PAGES = 32
"""Of that request at least, if the window has them."""


class RightOfWay:
    """Of one fill. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._trickled_at = self._demanded_at = self._since = -math.inf

    def left_seconds(self, now: float, demanded_at: float, round_trip_seconds: float) -> float:
        """For how long demands have the link to themselves; 0 or less: they do not.

        Args:
            demanded_at: when the last demand was; minus infinity before the first.
            round_trip_seconds: the best one seen; infinite before any.
        """
        if not SHORTEST_ROUND_TRIP_SECONDS <= round_trip_seconds < math.inf:
            return 0.0
        return demanded_at + max(SECONDS, ROUND_TRIPS * round_trip_seconds) - now

    def passes(self, now: float, demanded_at: float, round_trip_seconds: float, *, requests_out: bool) -> bool:
        """Whether a request may be sent now, which is then taken for sent. `requests_out`: some are on their way."""
        if self.left_seconds(now, demanded_at, round_trip_seconds) <= 0:
            return True
        if demanded_at - self._demanded_at > PAUSE_SECONDS:
            self._since = demanded_at
        self._demanded_at = demanded_at
        pause = FIRST_TRICKLE_SECONDS if now - self._since < PATIENCE_SECONDS else TRICKLE_SECONDS
        if requests_out or now - self._trickled_at < pause:
            return False
        self._trickled_at = now
        return True
