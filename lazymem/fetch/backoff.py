"""How long to wait before trying again: exponential back-off with full jitter. Pure; no clock, the caller sleeps.

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: of the variants there, full jitter
makes many clients of one restarted server do the least work in total.
"""

from __future__ import annotations

import random

_MAX_DOUBLINGS = 32
"""Beyond this every base is past every cap; keeps 2**n small however long a server is away."""


class Backoff:
    """Delays in seconds, each uniform between 0 and ``min(cap, base * 2**n)``."""

    def __init__(self, base_seconds: float, cap_seconds: float, rng: random.Random) -> None:
        self._base = base_seconds
        self._cap = cap_seconds
        self._rng = rng
        self._failures = 0

    def next_delay(self) -> float:
        """Count one more failure and say how long to wait for it."""
        ceiling = min(self._cap, self._base * 2**self._failures)
        self._failures = min(self._failures + 1, _MAX_DOUBLINGS)
        return self._rng.uniform(0.0, ceiling)

    def reset(self) -> None:
        """Something worked: the next failure is a first one."""
        self._failures = 0
