"""A fill gives way to demands: for a while, on a link where they meet, and never for good."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lazymem.fetch.rightofway import (
    FIRST_TRICKLE_SECONDS,
    PATIENCE_SECONDS,
    PAUSE_SECONDS,
    ROUND_TRIPS,
    SECONDS,
    SHORTEST_ROUND_TRIP_SECONDS,
    TRICKLE_SECONDS,
    RightOfWay,
)

FAST, SLOW = 0.001, 0.02


def passes(way: RightOfWay, now: float, demanded_at: float, round_trip: float = SLOW, *, out: bool = False) -> bool:
    return way.passes(now, demanded_at, round_trip, requests_out=out)


def test_nothing_gives_way_before_the_first_demand() -> None:
    way = RightOfWay()
    assert all(passes(way, now, -math.inf, out=True) for now in (0.0, 1.0, 2.0))


def test_a_demand_has_the_link_for_two_round_trips() -> None:
    way = RightOfWay()
    assert passes(way, 10.0, 10.0), "the trickle"
    assert not passes(way, 10.0 + ROUND_TRIPS * SLOW - 0.001, 10.0)
    assert passes(way, 10.0 + ROUND_TRIPS * SLOW, 10.0)
    assert passes(way, 10.0 + ROUND_TRIPS * SLOW, 10.0, out=True)


def test_over_a_fast_link_as_long_as_a_guest_takes_to_its_next_demand() -> None:
    way = RightOfWay()
    assert not passes(way, 10.0 + SECONDS - 0.001, 10.0, FAST, out=True)
    assert passes(way, 10.0 + SECONDS, 10.0, FAST, out=True)


def test_within_a_host_nothing_gives_way() -> None:
    assert passes(RightOfWay(), 10.0, 10.0, SHORTEST_ROUND_TRIP_SECONDS / 2, out=True)
    assert passes(RightOfWay(), 10.0, 10.0, math.inf, out=True), "nothing is known of the link yet"


@given(st.lists(st.floats(0.0001, 0.02), min_size=200, max_size=400), st.sampled_from([FAST, SLOW]))
def test_a_guest_that_demands_without_end_leaves_a_trickle(pauses: list[float], round_trip: float) -> None:
    """A demand at each moment: what passes is one request in a pause, no more and hardly less."""
    for began, trickle in ((0.0, FIRST_TRICKLE_SECONDS), (-PATIENCE_SECONDS, TRICKLE_SECONDS)):
        way, now, sent = RightOfWay(), began, []
        while now < 0:
            passes(way, now, now, round_trip)
            now += PAUSE_SECONDS / 2
        first = now
        for pause in pauses:
            now += pause
            if passes(way, now, now, round_trip):
                sent.append(now)
        assert all(later - earlier >= trickle for earlier, later in pairwise(sent))
        assert len(sent) >= (now - first) / (trickle + max(pauses)) - 1


def test_after_a_pause_a_guest_that_demands_begins_anew() -> None:
    way, now = RightOfWay(), 0.0
    while now < 2 * PATIENCE_SECONDS:
        passes(way, now, now)
        now += TRICKLE_SECONDS
    assert passes(way, now, now), "the trickle of one that demands without end"
    now += PAUSE_SECONDS + SLOW
    assert passes(way, now, now)
    assert not passes(way, now + TRICKLE_SECONDS, now + TRICKLE_SECONDS)
    assert passes(way, now + FIRST_TRICKLE_SECONDS, now + FIRST_TRICKLE_SECONDS)


def test_the_trickle_is_one_request_at_a_time() -> None:
    way = RightOfWay()
    assert not passes(way, 10.0, 10.0, out=True)
    assert passes(way, 10.0, 10.0)
