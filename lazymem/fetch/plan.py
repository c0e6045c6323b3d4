"""What to send next: a pure decision over what waits and what is out; the scheduler carries the actions out.

Rules it keeps: demand before background; many readers' ranges in one request; never more out than the budget.
A demand is sent at once while a request slot is free, since waiting for company would cost it time; ranges pile up,
and then travel together, only while all slots are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from lazymem.pages import PageRange


class Wanted(Protocol):
    """What the plan needs to know of an in-flight want."""

    @property
    def pages(self) -> PageRange: ...
    @property
    def attempts(self) -> int: ...


W = TypeVar("W", bound=Wanted)


class Budget(Struct, frozen=True):
    """What may be out at a time."""

    max_request_pages: int = 256
    """1 MiB: one leaf, and 8 ms of a gigabit link."""
    max_request_ranges: int = 64
    max_demand_requests: int = 32
    """A guest of 32 vCPUs that all stand; more waits pile up and travel together."""
    max_unkept_pages: int = 16384
    """64 MiB wait in memory for a slow cache disk; then nothing more is asked for (rule 8)."""


class Load(Struct, frozen=True):
    """What is out now."""

    demand_requests: int
    background_pages: int
    unkept_pages: int


class Send(Struct, Generic[W], frozen=True):
    """One request: these wants, ascending by page."""

    wants: tuple[W, ...]

    @property
    def ranges(self) -> tuple[PageRange, ...]:
        return merged(want.pages for want in self.wants)


def plan_demand(waiting: Sequence[W], load: Load, budget: Budget) -> list[Send[W]]:
    """Requests to send now for the `waiting` wants (oldest first, not overlapping).

    A want that failed verification before goes alone, so that it drags nobody with it a second time. One that is
    larger than a request is allowed to be goes alone too (the client splits it).
    """
    if load.unkept_pages >= budget.max_unkept_pages:
        return []
    slots = budget.max_demand_requests - load.demand_requests
    if len(waiting) == 1 and slots > 0:  # nearly always: no list is worth building
        return [Send((waiting[0],))]
    sends: list[Send[W]] = []
    batch: list[W] = []
    batch_pages = 0
    for want in waiting:
        if len(sends) >= slots:
            return sends
        if want.attempts:
            sends.append(Send((want,)))
            continue
        full = batch_pages + want.pages.count > budget.max_request_pages or len(batch) >= budget.max_request_ranges
        if batch and full:
            sends.append(_send(batch))
            batch, batch_pages = [], 0
        batch.append(want)
        batch_pages += want.pages.count
    if batch and len(sends) < slots:
        sends.append(_send(batch))
    return sends


def background_allowance(demand_waiting: bool, load: Load, budget: Budget, window_pages: int) -> int:
    """How many guessed pages may be asked for now, 0 for none.

    None while a demand waits unsent, and only into half of the memory for unkept pages: the other half is demand's.
    """
    if demand_waiting:
        return 0
    memory = budget.max_unkept_pages // 2 - load.unkept_pages - load.background_pages
    return max(0, min(window_pages - load.background_pages, memory))


def merged(ranges: Iterable[PageRange]) -> tuple[PageRange, ...]:
    """Ascending ranges with neighbours joined."""
    found: list[PageRange] = []
    for pages in ranges:
        if found and found[-1].end == pages.start:
            found[-1] = PageRange(found[-1].start, found[-1].count + pages.count)
        else:
            found.append(pages)
    return tuple(found)


def split(ranges: Sequence[PageRange], max_pages: int, max_ranges: int) -> list[tuple[PageRange, ...]]:
    """Ascending ranges as the fewest requests, in order, of at most so many pages and ranges each."""
    requests: list[tuple[PageRange, ...]] = []
    batch: list[PageRange] = []
    room = max_pages
    for pages in ranges:
        start = pages.start
        while start < pages.end:
            if not room or len(batch) >= max_ranges:
                requests.append(tuple(batch))
                batch, room = [], max_pages
            count = min(pages.end - start, room)
            batch.append(PageRange(start, count))
            room -= count
            start += count
    if batch:
        requests.append(tuple(batch))
    return requests


def _send(batch: list[W]) -> Send[W]:
    return Send(tuple(sorted(batch, key=lambda want: want.pages.start)))
