"""Rule 1: a page that the guest wrote is never overwritten by fetched bytes, whatever the order.

Every order of: start a read, start a write, start a second write, drop the cache, and each step of the fetch.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from lazymem.errors import ServerUnreachableError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.guestram import GuestRam
from lazymem.store.layers import ErrorLayer
from lazymem.store.pagemap import UNSET
from tests.support.gates import Step, SteppedDemand, settle
from tests.support.shortway import read_as_channel
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import OpenStore, build_store, local_source, opened_store

PAGES = 8
FIRST = 2 * PAGE_SIZE
"""The read covers pages 2 to 5; writes lie around and in it."""
READ_BYTES = 4 * PAGE_SIZE

Write = tuple[int, bytes]
WRITES: dict[str, Write] = {
    "whole page": (3 * PAGE_SIZE, b"w" * PAGE_SIZE),
    "part of a page": (3 * PAGE_SIZE + 100, b"p" * 50),
    "across pages": (3 * PAGE_SIZE - 100, b"a" * (PAGE_SIZE + 200)),
    "all and more": (PAGE_SIZE + 5, b"m" * (6 * PAGE_SIZE)),
}
SECOND: Write = (3 * PAGE_SIZE + 120, b"2" * 60)


async def _read(ram: GuestRam, offset: int, length: int, at_answer: Callable[[], None]) -> bytes:
    data = await ram.read(offset, length)
    at_answer()
    return data


class Play:
    """One order of events over a fresh store, with what a plain file would hold."""

    def __init__(self, store: OpenStore, snapshot: BuiltSnapshot, demand: SteppedDemand, nursery: trio.Nursery) -> None:
        self.store = store
        self.ram = GuestRam(store.pristine, store.state, demand)
        self.demand = demand
        self.nursery = nursery
        self.model = bytearray(snapshot.ram)
        self.started: list[Write] = []
        self.result: tuple[bytes, bytes, list[Write]] = (b"", b"never", [])
        self.short = False

    async def read(self) -> None:
        """Keeps what the file held when the read returned, and the writes that had begun but not ended by then."""
        data = await (read_as_channel if self.short else _read)(self.ram, FIRST, READ_BYTES, self._note_answer)
        self.result = data, *self.result[1:]

    def _note_answer(self) -> None:
        self.result = b"", bytes(self.model[FIRST : FIRST + READ_BYTES]), list(self.started)

    async def write(self, write: Write) -> None:
        self.started.append(write)
        await self.ram.write(*write)
        # No await since the acknowledgement: a read that returns later must show it.
        offset, data = write
        self.model[offset : offset + len(data)] = data
        self.started.remove(write)

    def drop(self) -> None:
        self.store.pristine.drop(PageRange(0, PAGES))


def events(play: Play, write: Write) -> dict[str, Callable[[], object]]:
    start = play.nursery.start_soon
    return {
        "read": lambda: start(play.read),
        "write": lambda: start(play.write, write),
        "second": lambda: start(play.write, SECOND),
        "drop": play.drop,
        "fetch": lambda: play.demand.open(Step.FETCH, Step.ACCEPT),
        "keep": lambda: play.demand.open(Step.KEEP, Step.RETURN),
    }


def orders() -> list[tuple[str, ...]]:
    names = ("read", "write", "second", "drop", "fetch", "keep")
    return [order for order in itertools.permutations(names) if order.index("fetch") < order.index("keep")]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("kind", WRITES)
async def test_every_order_of_read_write_and_fetch(kind: str, short: bool, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=5)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert store.state
        for order in orders():
            await _play(store, snapshot, order, WRITES[kind], short)
            store.state.written.set(PageRange(0, PAGES), UNSET)


async def _play(store: OpenStore, snapshot: BuiltSnapshot, order: tuple[str, ...], write: Write, short: bool) -> None:
    store.pristine.drop(PageRange(0, PAGES))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            demand = SteppedDemand(store.source, store.pristine, nursery if short else None)
            play = Play(store, snapshot, demand, nursery)
            play.short = short
            for event in order:
                events(play, write)[event]()
                await settle(store)
    data, held, open_writes = play.result
    if not open_writes:
        assert data == held, order
    demand = SteppedDemand(store.source, store.pristine)
    demand.open_all()
    play.ram = GuestRam(store.pristine, store.state, demand)
    assert await play.ram.read(0, len(play.model)) == play.model, order
    play.drop()
    assert await play.ram.read(0, len(play.model)) == play.model, order


async def test_both_writes_of_one_page_count_when_the_page_comes_late(tmp_path: Path) -> None:
    """Two parts of one missing page: the second waits for the first, and neither is lost."""
    snapshot = make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=6)
    source = local_source(snapshot)
    store = build_store(snapshot, tmp_path / "cache", source)
    demand = SteppedDemand(source, store.pristine)
    ram = GuestRam(store.pristine, store.state, demand)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ram.write, 10, b"one")
        await settle(store)
        nursery.start_soon(ram.write, 11, b"two")
        nursery.start_soon(ram.write, PAGE_SIZE, bytes(PAGE_SIZE))
        await settle(store)
        assert demand.waiting == 1
        assert ram.written_pages == 1, "the write of another page does not wait"
        demand.open_all()
    assert demand.asked == [PageRange(0, 1)]
    assert (await ram.read(0, 20))[10:14] == b"otwo"
    await ram.close()
    source.close()


async def _with_waiting_demand(
    snapshot: BuiltSnapshot, cache: Path, operation: Callable[[GuestRam], Awaitable[object]], step: Step
) -> None:
    """Cancel `operation` while its demand waits before `step`; afterwards all is as if it had never begun."""
    source = local_source(snapshot)
    store = build_store(snapshot, cache, source)
    demand = SteppedDemand(source, store.pristine)
    ram = GuestRam(store.pristine, store.state, demand)
    demand.open(*list(Step)[: list(Step).index(step)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operation, ram)
        await settle(store)
        assert demand.waiting
        nursery.cancel_scope.cancel()
    assert demand.waiting == 0
    assert ram.written_pages == 0
    demand.open_all()
    with trio.fail_after(60):
        assert await ram.read(0, len(snapshot.ram)) == snapshot.ram
        await ram.write(5, b"after")  # nothing is locked any more
    assert (await ram.read(0, 20))[:10] == snapshot.ram[:5] + b"after"
    await ram.close()
    source.close()


@pytest.mark.parametrize("step", Step)
async def test_a_cancelled_read_or_write_leaves_nothing_behind(step: Step, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=7)
    await _with_waiting_demand(snapshot, tmp_path / "a", lambda ram: ram.read(0, len(snapshot.ram)), step)
    await _with_waiting_demand(snapshot, tmp_path / "b", lambda ram: ram.write(3, b"x" * 9000), step)


async def test_a_part_write_waits_for_a_lost_server_and_fails_without_a_trace(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=8)
    source = local_source(snapshot)
    store = build_store(snapshot, tmp_path / "cache", ErrorLayer(source, range(1)))
    with pytest.raises(ServerUnreachableError):
        await store.ram.write(7, b"part")
    assert store.ram.written_pages == 0
    await store.ram.write(7, b"part")
    assert await store.ram.read(0, 16) == snapshot.ram[:7] + b"part" + snapshot.ram[11:16]
    await store.ram.close()
    source.close()
