"""Which candidates are decided when: touched leaves first, refused pages at once, and nothing is held back for ever."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from lazymem.digests import LEAF_PAGES
from lazymem.errors import LazymemError, ServerRefusedError, StoreError, VerificationError
from lazymem.fetch.adopting import MAX_ASKED, Adopting
from lazymem.pages import PageRange


class Source:
    """Answers a leaf when it is let; `errors`: instead of some leaves."""

    def __init__(self, errors: dict[int, LazymemError] | None = None) -> None:
        self.best_round_trip_seconds = 0.02
        self.asked: list[int] = []
        self.errors = errors or {}
        self.limiter = trio.CapacityLimiter(1)
        self.gate = trio.Event()

    async def leaf_digests(self, leaf: int) -> bytes:
        self.asked.append(leaf)
        if len(self.asked) > 1:
            await self.gate.wait()
        await trio.sleep(0.001)
        if leaf in self.errors:
            raise self.errors[leaf]
        return b"digests of %d" % leaf


class Adopter:
    def __init__(self, leaves: Sequence[int], errors: dict[int, LazymemError] | None = None) -> None:
        self.leaves = list(leaves)
        self.errors = errors or {}
        self.adopted: list[int] = []
        self.given_up: list[int] = []
        self.finished = 0

    async def begin(self) -> list[int]:
        await trio.lowlevel.checkpoint()
        if -1 in self.errors:
            raise self.errors[-1]
        return self.leaves

    async def adopt(self, leaf: int, digests: bytes) -> list[PageRange]:
        await trio.lowlevel.checkpoint()
        assert digests == b"digests of %d" % leaf
        if leaf in self.errors:
            raise self.errors[leaf]
        self.adopted.append(leaf)
        return [PageRange(leaf * LEAF_PAGES + 3, 2)] if leaf % 2 else []

    def give_up(self, leaf: int) -> None:
        self.given_up.append(leaf)

    def finish(self) -> None:
        self.finished += 1


class Told:
    """What the scheduler would hear."""

    def __init__(self) -> None:
        self.brought: list[PageRange] = []
        self.looks = 0

    async def bring(self, ranges: Sequence[PageRange]) -> None:
        self.brought += ranges
        await trio.sleep(0.01)

    def look(self) -> None:
        self.looks += 1


def adopting(source: Source, adopter: Adopter, told: Told) -> Adopting:
    return Adopting(source, adopter, told.bring, told.look)


async def test_every_leaf_is_decided_once(autojump_clock: trio.testing.MockClock) -> None:
    source, adopter, told = Source(), Adopter(range(40)), Told()
    source.gate.set()
    await adopting(source, adopter, told).run()
    assert sorted(source.asked) == list(range(40))
    assert sorted(adopter.adopted) == list(range(40))
    assert adopter.finished == 1
    assert told.looks == 2


async def test_nothing_is_looked_at_before_the_source_answers(autojump_clock: trio.testing.MockClock) -> None:
    """It does for a guest that stands."""
    source, adopter, told = Source(), Adopter([1]), Told()
    with trio.move_on_after(0.0005):
        await adopting(source, adopter, told).run()
    assert (source.asked, adopter.adopted) == ([0], [])
    assert (adopter.finished, told.looks) == (1, 1)  # cancelled: whatever was held back may come


async def test_what_is_touched_goes_first(autojump_clock: trio.testing.MockClock) -> None:
    source, adopter, told = Source(), Adopter(range(100)), Told()
    found = adopting(source, adopter, told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        await trio.sleep(0.5)
        before = len(source.asked)
        assert before <= 1 + MAX_ASKED
        found.faulted(PageRange(90 * LEAF_PAGES - 1, 2))
        found.faulted(PageRange(90 * LEAF_PAGES, 1))
        found.faulted(PageRange(5, 1))  # was asked for already
        source.gate.set()
    assert source.asked[before : before + 2] == [89, 90]
    assert sorted(source.asked) == list(range(100))


async def test_what_was_refused_is_brought_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    source, adopter, told = Source(), Adopter(range(200)), Told()
    source.gate.set()
    await adopting(source, adopter, told).run()
    assert {run.start // LEAF_PAGES for run in told.brought} <= set(range(1, 200, 2))
    assert told.brought


@pytest.mark.parametrize("error", [VerificationError("changed"), ServerRefusedError("no")])
@pytest.mark.parametrize("at", ["source", "adopter"])
async def test_a_leaf_that_is_not_told_is_given_up(
    error: LazymemError, at: str, autojump_clock: trio.testing.MockClock
) -> None:
    errors = {7: error}
    source = Source(errors if at == "source" else None)
    adopter = Adopter(range(20), errors if at == "adopter" else None)
    told = Told()
    source.gate.set()
    await adopting(source, adopter, told).run()
    assert adopter.given_up == [7]
    assert sorted(adopter.adopted) == [leaf for leaf in range(20) if leaf != 7]
    assert adopter.finished == 1


@pytest.mark.parametrize("leaf", [-1, 0, 7])
async def test_a_disk_that_refuses_ends_it(leaf: int, autojump_clock: trio.testing.MockClock) -> None:
    source, adopter, told = Source(), Adopter(range(20), {leaf: StoreError("full")}), Told()
    source.gate.set()
    await adopting(source, adopter, told).run()
    assert adopter.finished == 1
    assert told.looks >= 1


async def test_a_source_that_refuses_at_once(autojump_clock: trio.testing.MockClock) -> None:
    source, adopter, told = Source({0: ServerRefusedError("no")}), Adopter([1]), Told()
    await adopting(source, adopter, told).run()
    assert (source.asked, adopter.adopted, adopter.finished, told.looks) == ([0], [], 1, 1)


@pytest.mark.parametrize(("seconds", "workers"), [(math.inf, 2), (0.0, 2), (0.002, 3), (0.02, 12), (9.0, MAX_ASKED)])
def test_how_many_are_asked_for_at_a_time(seconds: float, workers: int) -> None:
    source = Source()
    source.best_round_trip_seconds = seconds
    assert adopting(source, Adopter([]), Told())._workers() == workers
