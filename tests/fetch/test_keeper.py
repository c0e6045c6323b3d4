"""The keeper: batches, order, errors, and an end that leaves nobody waiting."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from lazymem.errors import LazymemError, StoreError
from lazymem.fetch.guesses import Asked
from lazymem.fetch.inflight import Want
from lazymem.fetch.keeper import MAX_BATCH_PAGES, Keeper, joined
from lazymem.pages import PAGE_SIZE, Fetched, PageRange, PageRun
from tests.support.memorysink import MemorySink

RAM = bytes(PAGE_SIZE) * (MAX_BATCH_PAGES * 3)


def fetched(start: int, count: int = 1) -> Fetched:
    return Fetched((PageRun(PageRange(start, count), None),), {start: b"leaf"}, {start: bytes(16 * count)})


class Keeping:
    def __init__(self) -> None:
        self.sink = MemorySink(RAM)
        self.kept: list[tuple[int, LazymemError | None]] = []
        self.keeper = Keeper(self.sink, self._on_kept)

    def _on_kept(self, wants: Sequence[Want], maybe_asked: Asked | None, maybe_error: LazymemError | None) -> None:
        assert maybe_asked is None
        self.kept += [(want.pages.start, maybe_error) for want in wants]

    def put(self, start: int, count: int = 1) -> None:
        self.keeper.put((Want(PageRange(start, count), background=False),), fetched(start, count))


async def test_what_gathers_is_kept_in_one_go_and_reported_in_order(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    keeping = Keeping()
    nursery.start_soon(keeping.keeper.run)
    await keeping.keeper.wait_idle()
    for start in (9, 3, 5):
        keeping.put(start)
    await keeping.keeper.wait_idle()
    assert keeping.kept == [(9, None), (3, None), (5, None)]
    (batch,) = keeping.sink.kept
    assert [run.pages.start for run in batch.runs] == [3, 5, 9]
    assert sorted(batch.leaves) == sorted(batch.page_digests) == [3, 5, 9]


async def test_batches_are_bounded(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    keeping = Keeping()
    nursery.start_soon(keeping.keeper.run)
    for start in range(0, MAX_BATCH_PAGES * 2, 256):
        keeping.put(start, 256)
    await keeping.keeper.wait_idle()
    assert [sum(run.pages.count for run in batch.runs) for batch in keeping.sink.kept] == [MAX_BATCH_PAGES] * 2


async def test_an_error_is_reported_for_all_of_its_batch_and_the_next_is_tried(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    keeping = Keeping()
    nursery.start_soon(keeping.keeper.run)
    keeping.sink.maybe_error = full = StoreError("full")
    keeping.put(0)
    keeping.put(1)
    await keeping.keeper.wait_idle()
    keeping.sink.maybe_error = None
    keeping.put(2)
    await keeping.keeper.wait_idle()
    assert keeping.kept == [(0, full), (1, full), (2, None)]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_nobody_waits_for_a_keeper_that_is_over(autojump_clock: MockClock, when: str) -> None:
    """A mount that is cancelled waits for it in a shielded scope: it must not hang there."""
    keeping = Keeping()
    keeping.sink.open = trio.Event()
    async with trio.open_nursery() as inner:
        inner.start_soon(keeping.keeper.run)
        keeping.put(0)
        await trio.sleep(1)
        if when == "before":
            inner.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            inner.cancel_scope.cancel()
            await keeping.keeper.wait_idle()
    keeping.put(1)
    await keeping.keeper.wait_idle()
    assert keeping.kept == []


def test_one_answer_is_passed_on_as_it_is() -> None:
    answer = fetched(1)
    assert joined([answer]) is answer
