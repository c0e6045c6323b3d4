"""The plan as a table, and its promises under random input."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.fetch.plan import Budget, Load, background_allowance, merged, plan_demand, split
from lazymem.pages import PageRange


@dataclass(frozen=True)
class Wanted:
    pages: PageRange
    attempts: int = 0


def want(start: int, count: int = 1, attempts: int = 0) -> Wanted:
    return Wanted(PageRange(start, count), attempts)


IDLE = Load(demand_requests=0, background_pages=0, unkept_pages=0)
SMALL = Budget(max_request_pages=8, max_request_ranges=3, max_demand_requests=2, max_unkept_pages=100)

# what waits, what is out, then the requests: each a list of (start, count)
TABLE = [
    ("nothing", [], IDLE, []),
    ("one page goes at once", [want(5)], IDLE, [[(5, 1)]]),
    ("many readers share a request, in page order", [want(9), want(2)], IDLE, [[(2, 1), (9, 1)]]),
    ("neighbours become one range", [want(3, 2), want(1, 2)], IDLE, [[(1, 4)]]),
    ("pages per request", [want(0, 6), want(10, 4)], IDLE, [[(0, 6)], [(10, 4)]]),
    ("ranges per request", [want(0), want(2), want(4), want(6)], IDLE, [[(0, 1), (2, 1), (4, 1)], [(6, 1)]]),
    ("larger than a request: alone, the client splits", [want(0, 20), want(30)], IDLE, [[(0, 20)], [(30, 1)]]),
    ("a second try goes alone", [want(0), want(5, 1, 1), want(8)], IDLE, [[(5, 1)], [(0, 1), (8, 1)]]),
    ("all slots taken", [want(0)], Load(2, 0, 0), []),
    ("one slot left: the oldest", [want(10, 8), want(0, 8)], Load(1, 0, 0), [[(10, 8)]]),
    ("one slot left: a second try takes it", [want(0), want(5, 1, 1)], Load(1, 0, 0), [[(5, 1)]]),
    ("guesses that are out do not hold demand back", [want(0)], Load(0, 10_000, 0), [[(0, 1)]]),
    ("too much in memory", [want(0)], Load(0, 0, 100), []),
]


@pytest.mark.parametrize(("name", "waiting", "load", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_table(name: str, waiting: list[Wanted], load: Load, expected: list[list[tuple[int, int]]]) -> None:
    sends = plan_demand(waiting, load, SMALL)
    assert [[(pages.start, pages.count) for pages in send.ranges] for send in sends] == expected


@pytest.mark.parametrize(
    ("name", "waiting", "load", "window", "expected"),
    [
        ("idle: the window", False, IDLE, 40, 40),
        ("a demand waits unsent: nothing", True, IDLE, 40, 0),
        ("what is out counts", False, Load(0, 30, 0), 40, 10),
        ("the window shrank", False, Load(0, 60, 0), 40, 0),
        ("half of the memory is demand's", False, Load(0, 0, 45), 40, 5),
        ("half of the memory is full", False, Load(0, 0, 80), 40, 0),
        ("demand in flight does not stop guesses", False, Load(2, 0, 0), 40, 40),
    ],
)
def test_background_table(name: str, waiting: bool, load: Load, window: int, expected: int) -> None:
    assert background_allowance(waiting, load, SMALL, window) == expected


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[PageRange]:
    found: list[PageRange] = []
    at = 0
    for gap, count in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), max_size=20)):
        found.append(PageRange(at + gap, count))
        at += gap + count
    return found


@given(disjoint_ranges(), st.randoms(), st.integers(0, 4))
def test_plan_sends_nothing_twice_and_stays_in_budget(
    ranges: list[PageRange], rng: object, demand_requests: int
) -> None:
    waiting = [Wanted(pages, attempts=index % 5 == 4) for index, pages in enumerate(ranges)]
    rng.shuffle(waiting)  # type: ignore[attr-defined]
    sends = plan_demand(waiting, Load(demand_requests, 0, 0), SMALL)
    sent = [wanted for send in sends for wanted in send.wants]
    assert len(sent) == len(set(sent))
    assert set(sent) <= set(waiting)
    assert len(sends) <= max(0, SMALL.max_demand_requests - demand_requests)
    for send in sends:
        pages = sum(wanted.pages.count for wanted in send.wants)
        assert pages <= SMALL.max_request_pages or len(send.wants) == 1
        assert len(send.wants) <= SMALL.max_request_ranges
        assert list(send.ranges) == sorted(send.ranges)
        assert sum(pages.count for pages in send.ranges) == pages
    if waiting and demand_requests < SMALL.max_demand_requests:
        assert sends


@given(disjoint_ranges(), st.integers(1, 10), st.integers(1, 4))
def test_split_covers_exactly_within_limits(ranges: list[PageRange], max_pages: int, max_ranges: int) -> None:
    requests = split(ranges, max_pages, max_ranges)
    for request in requests:
        assert 1 <= len(request) <= max_ranges
        assert sum(pages.count for pages in request) <= max_pages
    assert merged(pages for request in requests for pages in request) == merged(ranges)
