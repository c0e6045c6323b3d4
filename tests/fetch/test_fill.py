"""`Fill` against the real server: everything comes, each page once, whatever the server and the cache do meanwhile."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from lazymem_server.serving import Serving, serve

from lazymem.fetch import fill as module
from lazymem.fetch.client import Client, connect
from lazymem.fetch.coming import Coming
from lazymem.fetch.fill import KEEPERS, MAX_UNKEPT_PAGES, Fill
from lazymem.fetch.lastdemand import LastDemand
from lazymem.fetch.prefetch import prepager
from lazymem.fetch.rightofway import FIRST_TRICKLE_SECONDS, TRICKLE_PAGES
from lazymem.pages import PAGE_SIZE, Fetched, PageRange, PageRun
from lazymem.settings import LinkSettings, parse_server
from lazymem.store.cachefolder import open_cache
from lazymem.store.pristine import PristinePages
from lazymem.wire.connection import ServerConnection
from lazymem.wire.messages import Capability
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import origin_of

PAGES = 1500
FAST = LinkSettings(backoff_base_seconds=0.01, backoff_cap_seconds=0.05)


@pytest.fixture
def snapshot(tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "snapshot", PAGES)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (nobody tells)
        await trio.sleep(0.001)


class Filling:
    def __init__(self, client: Client, pristine: PristinePages, work: Fill) -> None:
        self.client = client
        self.pristine = pristine
        self.work = work

    async def wait_idle(self) -> None:
        await until(lambda: self.pristine.next_missing(PageRange(0, PAGES), 1) is None and not self.work.is_busy)

    async def read_all(self) -> bytes:
        """What the cache holds, verified as it is read."""
        found = []
        for page in range(PAGES):
            here = PageRange(page, 1)
            if self.pristine.maybe_read_held_nowait(here) is not None:
                found.append(self.pristine.maybe_read_held_nowait(here) or b"")
            else:
                data, wrong = await self.pristine.read(here)
                assert not wrong
                found.append(data)
        return b"".join(found)


@asynccontextmanager
async def filling(
    snapshot: BuiltSnapshot, address: str, cache: Path, recorded: tuple[PageRange, ...] = (), *, sweep: bool = True
) -> AsyncIterator[Filling]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            client = await connect(nursery, parse_server(address), FAST)
            origin = origin_of(snapshot)
            pristine = PristinePages(origin, open_cache(cache, origin), await client.fetch_upper())
            guesses = prepager(
                pristine.next_missing,
                PAGES,
                recorded=recorded,
                sweep=sweep,
                maybe_leaf_missing=pristine.missing_leaves,
            )
            work = Fill(client, pristine, PAGES, guesses, LastDemand())
            pristine.wire_bytes_per_second = lambda: work.bytes_per_second
            nursery.start_soon(work.run)
            yield Filling(client, pristine, work)
            nursery.cancel_scope.cancel()
        pristine.close()


async def started(nursery: trio.Nursery, folder: Path, address: str = "127.0.0.1:0") -> Serving:
    serving: Serving = await nursery.start(partial(serve, [folder], [address]))
    return serving


@pytest.mark.parametrize("packs", [True, False])
async def test_everything_comes_and_no_page_twice(
    snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    if not packs:  # an earlier server
        monkeypatch.setattr(ServerConnection, "capabilities", lambda *_, **__: Capability.ZSTD)
    serving = await started(nursery, snapshot.folder)
    async with filling(snapshot, serving.addresses[0], tmp_path / "cache") as fill:
        await fill.wait_idle()
        assert await fill.read_all() == snapshot.ram
        assert fill.work.brought_pages <= PAGES
        assert (fill.work.in_flight_pages, fill.work.rejected_pages) == (0, 0)
    nursery.cancel_scope.cancel()


async def test_a_recorded_set_alone(snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery) -> None:
    """In the order of the recording, its zero pages by their digests, and nothing else."""
    recorded = (PageRange(700, 40), PageRange(3, 1), PageRange(256, 2))
    serving = await started(nursery, snapshot.folder)
    async with filling(snapshot, serving.addresses[0], tmp_path / "cache", recorded, sweep=False) as fill:
        await until(lambda: not any(list(fill.pristine.missing_runs(pages)) for pages in recorded))
        wanted = {snapshot.page(page) for pages in recorded for page in range(pages.start, pages.end)}
        held = [page for page in range(PAGES) if fill.pristine.states(PageRange(page, 1)) == b"\1"]
        assert all(snapshot.page(page) in wanted for page in held), "only these, and copies of them"
    nursery.cancel_scope.cancel()


async def test_a_server_that_restarts_again_and_again(
    snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """What came before the cut is not asked for again; what did not, is."""
    address = f"unix:{tmp_path}/socket"
    up, connected = trio.Event(), trio.Event()

    async def restarts() -> None:
        for turn in range(6):
            async with trio.open_nursery() as inner:
                await started(inner, snapshot.folder, address)
                up.set()
                await connected.wait()  # of a server that is gone, a first connection is an error
                if turn < 5:
                    await trio.sleep(0.02)
                    inner.cancel_scope.cancel()

    nursery.start_soon(restarts)
    await up.wait()
    async with filling(snapshot, address, tmp_path / "cache") as fill:
        connected.set()
        await fill.wait_idle()
        assert await fill.read_all() == snapshot.ram
    nursery.cancel_scope.cancel()


async def test_pages_that_the_server_lost_stay_missing_and_hold_nobody_up(
    snapshot: BuiltSnapshot, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """The file is not what was hashed: those pages are refused, and never kept."""
    wrong = 600
    with (snapshot.folder / "pc.ram").open("r+b") as file:
        file.seek(wrong * PAGE_SIZE)
        file.write(b"not what it was" * 10)
    serving = await started(nursery, snapshot.folder)
    async with filling(snapshot, serving.addresses[0], tmp_path / "cache") as fill:
        states = fill.pristine.states
        await until(lambda: fill.work.rejected_pages > 0 and states(PageRange(0, PAGES)).count(b"\0") < PAGES // 2)
        assert states(PageRange(wrong, 1)) == b"\0"
    nursery.cancel_scope.cancel()


class OnlyCopies:
    """A sink whose one missing page is equal to a held one, and so is never asked for."""

    def __init__(self) -> None:
        self.has_copies = False
        self.copied = trio.Event()
        self.gate = trio.Event()

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        self.has_copies = True
        return []

    async def copy_equal(self) -> None:
        self.has_copies = False
        await self.gate.wait()
        self.copied.set()


class OneGuess:
    def __init__(self) -> None:
        self.left = [PageRange(7, 1)]

    def next_range(self, max_pages: int) -> PageRange | None:
        return self.left.pop() if self.left else None

    def brought(self, pages: PageRange) -> None:
        pass


async def test_what_is_only_to_be_copied_waits_for_no_answer(nursery: trio.Nursery) -> None:
    """Nothing is on its way then, whose arrival would have it copied."""
    sink = OnlyCopies()
    work = Fill(None, sink, 8, OneGuess(), LastDemand())  # type: ignore[arg-type]  # only these of their methods
    with trio.fail_after(60):
        nursery.start_soon(work.run)
        await until(lambda: not sink.has_copies and work.is_busy)
        sink.gate.set()
        await sink.copied.wait()
        await until(lambda: not work.is_busy)
    nursery.cancel_scope.cancel()


class OnlyAsked:
    """A source over a link of 20 ms that answers when it is told to, and notes what it is asked."""

    best_round_trip_seconds = 0.02
    wire_received_bytes = 0

    def __init__(self) -> None:
        self.asked: list[list[PageRange]] = []
        self._done: list[Callable[[Fetched], None]] = []

    def start_fetch(
        self, ranges: list[PageRange], *, want_leaves: bool, background: bool, on_done: Callable[[Fetched], None]
    ) -> None:
        assert background
        self.asked.append(ranges)
        self._done.append(on_done)

    def answer_first(self) -> None:
        """The oldest that is open."""
        self._done.pop(0)(Fetched(()))

    def answer_with_data(self) -> None:
        """As `answer_first`, with its pages."""
        ranges = self.asked[-len(self._done)]
        self._done.pop(0)(Fetched(tuple(PageRun(pages, bytes(pages.length_bytes)) for pages in ranges)))

    def answer(self) -> None:
        self.wire_received_bytes += sum(pages.length_bytes for pages in self.asked[-len(self._done)])
        self._done.pop(0)(Fetched(()))


class TakesAll:
    """A sink that lacks everything."""

    has_copies = False

    def worth_fetching(self, pages: PageRange) -> list[PageRange]:
        return [pages]

    def missing_leaves(self, pages: PageRange) -> bool:
        return False

    def accept(self, fetched: Fetched) -> None:
        pass

    async def keep(self, fetched: Fetched) -> None:
        pass


class Clock:
    """Stands, unless a test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which the fill goes."""
    found = Clock()
    monkeypatch.setattr(module, "perf_counter", found)
    return found


class Demanding(LastDemand):
    """A guest that faults now, whenever that is asked."""

    ends = False

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    @property
    def seconds(self) -> float:
        return -math.inf if self.ends else self._clock()

    @seconds.setter
    def seconds(self, now: float) -> None:
        raise AssertionError("the filling process only looks")


def everything(pages: PageRange, limit: int) -> PageRange:
    return PageRange(pages.start, min(limit, pages.count))


async def test_whoever_demands_is_told_how_fast_the_link_is(nursery: trio.Nursery, clock: Clock) -> None:
    """Its own few guesses do not show that."""
    source, coming = OnlyAsked(), Coming(PAGES)
    work = Fill(source, TakesAll(), PAGES, prepager(everything, PAGES), LastDemand(), coming)  # type: ignore[arg-type]
    with trio.fail_after(60):
        nursery.start_soon(work.run)
        await until(lambda: bool(source.asked))
        assert coming.bytes_per_second == 0
        clock.now += 0.02
        source.answer()
        assert coming.bytes_per_second == work.bytes_per_second > 0
    nursery.cancel_scope.cancel()


async def test_a_fill_gives_way_to_demands_that_are_near_each_other(nursery: trio.Nursery, clock: Clock) -> None:
    """One request at a time, and not the next one when its answer comes; then, once nobody demands, all that fits."""
    source, demands = OnlyAsked(), Demanding(clock)
    demands.is_near = True
    work = Fill(source, TakesAll(), PAGES, prepager(everything, PAGES), demands)  # type: ignore[arg-type]
    with trio.fail_after(60):
        nursery.start_soon(work.run)
        await until(lambda: bool(source.asked))
        source.answer()
        await trio.testing.wait_all_tasks_blocked()
        assert (len(source.asked), work.in_flight_pages) == (1, 0)
        clock.now += 2 * FIRST_TRICKLE_SECONDS
        await until(lambda: len(source.asked) == 2)
        assert [sum(pages.count for pages in ranges) for ranges in source.asked] == [TRICKLE_PAGES, TRICKLE_PAGES]
        assert work.bytes_per_second == 0, "how slow a trickle is says nothing of the link"
        demands.ends = True
        source.answer()
        await until(lambda: len(source.asked) > 2)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("recorded", [(), (PageRange(0, 1000),)], ids=["a sweep", "a recorded set"])
async def test_what_may_well_be_demanded_next_does_not_give_way(
    nursery: trio.Nursery, clock: Clock, recorded: tuple[PageRange, ...]
) -> None:
    """A recorded set; and any page, while demands are far apart."""
    source, demands = OnlyAsked(), Demanding(clock)
    demands.is_near = bool(recorded)
    work = Fill(source, TakesAll(), PAGES, prepager(everything, PAGES, recorded=recorded), demands)  # type: ignore[arg-type]
    with trio.fail_after(60):
        nursery.start_soon(work.run)
        await until(lambda: len(source.asked) > 1)
    nursery.cancel_scope.cancel()


class SettledWindow:
    """So many pages; a piece is a third of it, as for a short round trip."""

    rate_bytes_per_second = 125e6

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.piece_pages = min(256, pages // 3)


@pytest.mark.parametrize("window", [48, 120, 384, 400, 640, 768, 1024])
def test_what_is_out_is_never_more_than_the_window(window: int) -> None:
    """Also where requests are of whole leaves; and all of it is used, but for less than a request."""
    source = OnlyAsked()
    work = Fill(source, TakesAll(), PAGES, prepager(everything, PAGES), LastDemand())  # type: ignore[arg-type]
    work._window = SettledWindow(window)  # type: ignore[assignment]
    work._send_more()
    assert window - work._window.piece_pages < work.in_flight_pages <= window
    assert work.in_flight_pages == sum(pages.count for asked in source.asked for pages in asked)


class SlowDisk(TakesAll):
    """What is to be kept stays unkept."""

    async def keep(self, fetched: Fetched) -> None:
        await trio.sleep_forever()


LARGE = 4 * MAX_UNKEPT_PAGES


async def test_what_a_slow_disk_has_not_kept_bounds_what_is_asked_for(nursery: trio.Nursery) -> None:
    """Rule 8: answers that wait in memory are no more than the bound, and what was out when it was met."""
    source = OnlyAsked()
    work = Fill(source, SlowDisk(), LARGE, prepager(everything, LARGE), LastDemand())  # type: ignore[arg-type]
    work._window = SettledWindow(1024)  # type: ignore[assignment]
    work._note = lambda *_: None  # type: ignore[method-assign]  # the window stays as it is
    nursery.start_soon(work.run)
    await trio.testing.wait_all_tasks_blocked()
    while work.in_flight_pages:
        source.answer_first()
        await trio.testing.wait_all_tasks_blocked()
    assert MAX_UNKEPT_PAGES <= work.brought_pages <= MAX_UNKEPT_PAGES + 1024
    nursery.cancel_scope.cancel()


class KeepsWhenTold(TakesAll):
    """Notes what it is given to keep, and keeps it when it is told to."""

    def __init__(self) -> None:
        self.given: list[tuple[PageRange, ...]] = []
        self._kept: list[trio.Event] = []

    async def keep(self, fetched: Fetched) -> None:
        self.given.append(tuple(run.pages for run in fetched.runs))
        self._kept.append(trio.Event())
        await self._kept[-1].wait()

    def keep_one(self) -> None:
        self._kept[len([kept for kept in self._kept if kept.is_set()])].set()


async def test_what_comes_while_some_is_kept_is_kept_beside_it(nursery: trio.Nursery) -> None:
    """A thread writes the first; of what waits, all is one batch. Each page is kept once, and none is left out."""
    source, sink = OnlyAsked(), KeepsWhenTold()
    work = Fill(source, sink, PAGES, prepager(everything, PAGES), LastDemand())  # type: ignore[arg-type]
    nursery.start_soon(work.run)
    await trio.testing.wait_all_tasks_blocked()
    answered: list[PageRange] = []
    for count in range(1, 2 * KEEPERS + 1):
        answered += source.asked[count - 1]
        source.answer_with_data()
        await trio.testing.wait_all_tasks_blocked()
        assert len(sink.given) == min(count, KEEPERS), "so many at a time"
    sink.keep_one()
    await trio.testing.wait_all_tasks_blocked()
    assert len(sink.given) == KEEPERS + 1
    for _ in range(KEEPERS):
        sink.keep_one()
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(pages for given in sink.given for pages in given) == sorted(answered)
    answered += source.asked[2 * KEEPERS]
    source.answer_with_data()
    await trio.testing.wait_all_tasks_blocked()
    assert sink.given[-1] == tuple(source.asked[2 * KEEPERS]), "and what comes later, too"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("demanded", [True, False])
async def test_a_fills_window_is_one_product_while_a_guest_demands_and_two_otherwise(
    nursery: trio.Nursery, clock: Clock, demanded: bool
) -> None:
    """Rule 5, over a link of 20 ms that brings 125 MB/s: what is out beyond one product stands in its queue."""
    source, demands = OnlyAsked(), Demanding(clock)
    demands.ends = not demanded
    work = Fill(source, TakesAll(), LARGE, prepager(everything, LARGE), demands)  # type: ignore[arg-type]
    product = int(0.02 * 125e6) // PAGE_SIZE
    for _ in range(20):
        source.wire_received_bytes += 125_000_000 // 50
        work.brought_pages += product
        work._note(0.02, source.wire_received_bytes - 125_000_000 // 50, work.brought_pages - product)
    work._send_more()
    assert work.in_flight_pages <= (1 if demanded else 2) * product + 1
    assert work.in_flight_pages > product // 2
    nursery.cancel_scope.cancel()


async def test_what_the_daemon_has_on_its_way_is_left_out_and_looked_at_again(nursery: trio.Nursery) -> None:
    """It may not come: then a sweep brings it, and the filling process does not end with a page missing."""
    source, coming, theirs = OnlyAsked(), Coming(PAGES), PageRange(100, 60)
    coming.demand(theirs)
    missing = set(range(PAGES))

    class Sink(TakesAll):
        async def keep(self, fetched: Fetched) -> None:
            missing.difference_update(page for asked in source.asked for part in asked for page in _numbers(part))

    def next_missing(pages: PageRange, limit: int) -> PageRange | None:
        first = next((page for page in range(pages.start, pages.end) if page in missing), None)
        return None if first is None else PageRange(first, 1)

    work = Fill(source, Sink(), PAGES, prepager(next_missing, PAGES), LastDemand(), coming)  # type: ignore[arg-type]
    work._window = SettledWindow(1024)  # type: ignore[assignment]
    work._note = lambda *_: None  # type: ignore[method-assign]
    nursery.start_soon(work.run)
    await trio.testing.wait_all_tasks_blocked()
    while work.in_flight_pages:
        source.answer_first()
        await trio.testing.wait_all_tasks_blocked()
    assert missing == set(_numbers(theirs))
    assert work.has_left_out
    work.look_at_left_out()
    await trio.testing.wait_all_tasks_blocked()
    assert work.in_flight_pages == 0, "it still has them"
    coming.forget(theirs)
    work.look_at_left_out()
    assert work.in_flight_pages == theirs.count
    assert not coming.free(theirs), "the daemon sees it"
    nursery.cancel_scope.cancel()


def _numbers(pages: PageRange) -> range:
    return range(pages.start, pages.end)


async def test_who_waits_is_told_when_pages_are_kept(nursery: trio.Nursery) -> None:
    source, coming, told = OnlyAsked(), Coming(PAGES), list[int]()
    work = Fill(
        source,  # type: ignore[arg-type]
        TakesAll(),  # type: ignore[arg-type]
        PAGES,
        prepager(everything, PAGES),
        LastDemand(),
        coming,
        lambda: told.append(work.brought_pages),
    )
    nursery.start_soon(work.run)
    await trio.testing.wait_all_tasks_blocked()
    first = source.asked[0][0]
    source.answer_first()
    await trio.testing.wait_all_tasks_blocked()
    assert not told, "nobody waits"
    assert not coming.is_guessed(first.start)
    coming.note_waiting(1)
    source.answer_first()
    await trio.testing.wait_all_tasks_blocked()
    assert len(told) == 1
    nursery.cancel_scope.cancel()
