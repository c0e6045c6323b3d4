"""The filler of the kernel's cache, without a mount: whose READs are its own, how many it has open, and a host without
threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import trio
from trio.testing import MockClock

from lazymem.fs import fillplan, mountinfo, pagecache
from lazymem.fs.pagecache import DEMAND_SECONDS, FILLED, MAX_OPEN, PATIENCE_SECONDS, PageCache
from lazymem.pages import PAGE_SIZE, PageRange

TOTAL = 64
MOUNT = mountinfo.Mount(1, "0:99", "/mnt", "fuse.lazymem", "server", None)


class Held:
    """Everything is; what was asked for is given."""

    total_pages = held_pages = TOTAL

    def __init__(self) -> None:
        self.given: set[int] = set()

    def fill_states(self, pages: PageRange) -> bytes:
        return bytes(fillplan.DONE if page in self.given else fillplan.READY for page in range(pages.start, pages.end))


class FakeFile:
    """The mount's own file: a READ comes of it at once."""

    opened = closed = 0

    def __init__(self, mounted: mountinfo.Mount) -> None:
        type(self).opened += 1

    def fileno(self) -> int:
        return -1

    def is_mounted(self) -> bool:
        return True

    def close(self) -> None:
        type(self).closed += 1


def filler(held: Held, demands_wait: Callable[[], bool] = lambda: False) -> PageCache:
    return PageCache(
        held, everything=True, demands_wait=demands_wait, fetching=lambda: False, room=lambda filled: 1 << 40
    )


class Kernel:
    """Sends a READ for each step that it is advised to take, at once; all of them are answered after `ANSWER_SECONDS`.
    `run_sync` stands in for trio's."""

    ANSWER_SECONDS = 0.0005

    def __init__(self, nursery: trio.Nursery, held: Held) -> None:
        self._nursery = nursery
        self._held = held
        self.cache = filler(held)
        self.open = 0
        self.taken: list[tuple[float, int, list[PageRange]]] = []
        """When, how many were open then with these, and which."""

    async def run_sync(
        self, work: Callable[..., object], *arguments: object, abandon_on_cancel: bool = False
    ) -> object:
        await trio.lowlevel.checkpoint()
        result = work(*arguments)
        if work == self.cache._advise:
            _, steps = arguments
            self._take(steps)  # type: ignore[arg-type]
        return result

    def _take(self, steps: Sequence[PageRange]) -> None:
        self.open += len(steps)
        self.taken.append((trio.current_time(), self.open, list(steps)))
        for step in steps:
            assert self.cache.takes(self.cache._thread, step.offset_bytes, step.length_bytes)
        self._nursery.start_soon(self._answer, steps)

    async def _answer(self, steps: Sequence[PageRange]) -> None:
        await trio.sleep(self.ANSWER_SECONDS)
        self.open -= len(steps)
        self._held.given.update(page for step in steps for page in range(step.start, step.end))

    def most_open(self, begin: float = 0.0, end: float = math.inf) -> int:
        return max(count for at, count, _ in self.taken if begin <= at < end)

    def least_pause(self) -> float:
        times = [at for at, _, _ in self.taken]
        return min(later - at for at, later in itertools.pairwise(times))


class ManyHeld(Held):
    """Enough for some hundred steps, but for the last page, which the guest has had."""

    total_pages = held_pages = 100 * fillplan.STEP_PAGES

    def __init__(self) -> None:
        super().__init__()
        self.given.add(self.total_pages - 1)


async def filled_while(
    monkeypatch: pytest.MonkeyPatch, demands_wait: Callable[[], bool], guest_pause: float = math.inf
) -> Kernel:
    """All of it, while the guest asks for a page every `guest_pause` seconds, for the first time before it all."""
    held = ManyHeld()
    monkeypatch.setattr(pagecache, "OwnFile", FakeFile)
    async with trio.open_nursery() as nursery:
        kernel = Kernel(nursery, held)
        kernel.cache = cache = filler(held, demands_wait)
        monkeypatch.setattr(trio.to_thread, "run_sync", kernel.run_sync)

        async def guest() -> None:
            while True:
                await trio.sleep(guest_pause)
                guest_reads()

        def guest_reads() -> None:
            assert not cache.takes(5, (held.total_pages - 1) * PAGE_SIZE, PAGE_SIZE)

        guest_reads()
        nursery.start_soon(guest)
        with trio.fail_after(600):
            await cache.run(MOUNT, trio.Event())
        nursery.cancel_scope.cancel()
    assert cache.statistics().state == FILLED
    assert held.given == set(range(held.total_pages))
    return kernel


async def test_only_a_few_steps_are_open_where_nobody_asks(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them whole, as one READ, and most of the kernel's background slots stay the guest's."""
    kernel = await filled_while(monkeypatch, lambda: False)
    assert kernel.most_open() == 4, "as record 9 has it; of the kernel's slots the guest keeps 60"
    steps = [step for _, _, steps in kernel.taken for step in steps]
    assert steps == list(fillplan.blocks(PageRange(0, ManyHeld.total_pages - 1)))
    assert kernel.cache.statistics().reads == len(steps)


async def test_one_step_is_open_while_a_demand_waits(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = await filled_while(monkeypatch, lambda: True)
    assert kernel.most_open() == 1
    assert kernel.least_pause() >= DEMAND_SECONDS


@pytest.mark.parametrize("pause", [0.0003, 0.003])
async def test_one_step_is_open_beside_a_guest_that_is_never_quiet(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """Also where it asks for nothing while a step is being made."""
    kernel = await filled_while(monkeypatch, lambda: False, guest_pause=pause)
    assert kernel.most_open() == 1
    assert kernel.least_pause() >= PATIENCE_SECONDS


async def test_a_guest_that_pauses_is_quiet_meanwhile(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next READ after a pause holds the steps back for a moment only."""
    kernel = await filled_while(monkeypatch, lambda: False, guest_pause=0.02)
    assert kernel.most_open() == MAX_OPEN


async def test_there_is_one_step_from_the_next_demand_on_and_more_behind_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = trio.current_time() + 0.01
    end = begin + 5 * DEMAND_SECONDS
    kernel = await filled_while(monkeypatch, lambda: begin <= trio.current_time() < end)
    assert kernel.most_open(end=begin) == MAX_OPEN
    assert kernel.most_open(begin, end) == 1
    assert kernel.most_open(end + DEMAND_SECONDS) == MAX_OPEN


def test_a_thread_that_we_cannot_see_is_the_guests() -> None:
    """Its id is 0 where the daemon has a pid namespace of its own; and ours is 0 while nothing is filled."""
    cache = filler(Held())
    assert not cache.takes(0, 0, PAGE_SIZE)
    assert not cache.takes(77, 0, PAGE_SIZE)
    assert cache.statistics().reads == 0


def test_a_page_is_brought_by_us_until_the_guest_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filler(Held())
    monkeypatch.setattr(cache, "_thread", 77)
    assert not cache.takes(5, 0, 2 * PAGE_SIZE)
    assert cache.takes(77, 2 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert cache.brought_at(range(8)) == bytes([0, 0, 1, 1, 1, 0, 0, 0])
    assert cache.brought_at(range(0, 8, 2)) == bytes([0, 1, 1, 0])
    assert not cache.takes(5, 3 * PAGE_SIZE, 4 * PAGE_SIZE), "the kernel had dropped it"
    assert cache.brought_at(range(8)) == bytes([0, 0, 1, 0, 0, 0, 0, 0])


async def test_a_host_without_threads_is_waited_for(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step it is in, and no file stays open, or the file system would outlive its unmount."""
    held = Held()
    calls = 0

    async def run_sync(work: Callable[..., object], *arguments: object, abandon_on_cancel: bool = False) -> object:
        nonlocal calls
        await trio.lowlevel.checkpoint()
        calls += 1
        if calls % 2:
            raise RuntimeError("can't start new thread")
        if work == cache._advise:
            _, steps = arguments
            held.given.update(page for step in steps for page in range(step.start, step.end))  # type: ignore[attr-defined]
        return work(*arguments)

    FakeFile.opened = FakeFile.closed = 0
    monkeypatch.setattr(pagecache, "OwnFile", FakeFile)
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    cache = filler(held)
    with trio.fail_after(600):
        await cache.run(MOUNT, trio.Event())
    assert cache.statistics().state == FILLED
    assert held.given == set(range(TOTAL))
    assert FakeFile.opened == FakeFile.closed > 0
