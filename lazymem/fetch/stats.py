"""What the fetch room counts: a cheap wait histogram and the frozen record that `statistics()` returns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

_BUCKETS_PER_OCTAVE = 4
"""Each bucket is 19 % wide: enough to tell two medians apart, and 140 counters cover 1 us to 8 hours."""

_BUCKETS = 35 * _BUCKETS_PER_OCTAVE


class WaitHistogram:
    """Counts of waits in logarithmic buckets from 1 us on; constant memory, well under a microsecond a wait."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.total = 0

    def add(self, seconds: float) -> None:
        self.total += 1
        if seconds <= 1e-6:
            self._counts[0] += 1
            return
        bucket = int(math.log2(seconds * 1e6) * _BUCKETS_PER_OCTAVE)
        self._counts[min(bucket, _BUCKETS - 1)] += 1

    def quantile(self, share: float) -> float | None:
        """Upper edge, in seconds, of the bucket in which the wait at `share` (0 to 1) lies. None: nothing counted."""
        if not self.total:
            return None
        rank = max(1, math.ceil(share * self.total))
        for bucket, count in enumerate(self._counts):
            rank -= count
            if rank <= 0:
                return float(2 ** ((bucket + 1) / _BUCKETS_PER_OCTAVE) * 1e-6)
        raise AssertionError("buckets and total disagree")

    def octaves(self) -> list[tuple[float, int]]:
        """(upper edge in seconds, waits up to it and above the edge before), from the shortest wait to the longest."""
        step = _BUCKETS_PER_OCTAVE
        counts = [sum(self._counts[first : first + step]) for first in range(0, _BUCKETS, step)]
        found = [(2 ** (octave + 1) * 1e-6, count) for octave, count in enumerate(counts)]
        while found and not found[-1][1]:
            found.pop()
        while found and not found[0][1]:
            found.pop(0)
        return found


class LinkCounters(Struct):
    """What one client counts while it runs; its two lanes share it."""

    wire_received_bytes: int = 0
    wire_sent_bytes: int = 0
    reconnects: int = 0


class LinkStatistics(Struct, frozen=True):
    """A client's connection. `connection` is a text for people: connected to whom, or since when and why not.
    `maybe_server`: the address of who answers demands now."""

    connection: str
    maybe_server: str | None
    connected: bool
    reconnects: int
    wire_received_bytes: int
    wire_sent_bytes: int
    open_requests: int
    round_trip_seconds: float | None
    """Shortest seen: of handshake and pings."""


class FetchStatistics(Struct, frozen=True):
    """A scheduler's work since its start. Pages count when they were verified; bytes are theirs, uncompressed."""

    demand_faults: int
    """Calls of `demand`, also those that were answered from memory."""
    wait_p50_seconds: float | None
    wait_p99_seconds: float | None
    demand_pages: int
    background_pages: int
    in_flight_pages: int
    background_in_flight_pages: int
    unkept_pages: int
    """Arrived and verified, not yet in the cache file."""
    queued_demands: int
    """Demanded ranges that no request has been sent for yet."""
    failures: int
    prefetching: bool
    link: LinkStatistics | None = None
    wait_octaves: Sequence[tuple[float, int]] = ()
    """Histogram of waits: upper edge in seconds, and how many; edges double."""
