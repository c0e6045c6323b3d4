"""The filler of the kernel's cache, without a mount: whose READs are its own, and a host without threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from lazymem.fs import fillplan, mountinfo, pagecache
from lazymem.fs.pagecache import FILLED, PageCache
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


def filler(held: Held) -> PageCache:
    return PageCache(
        held, everything=True, demands_wait=lambda: False, fetching=lambda: False, room=lambda filled: 1 << 40
    )


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
