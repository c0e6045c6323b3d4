"""Refused read-ahead that follows: which pages, when, and whose READs they are; with a real thread and no mount."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from lazymem.fs import mountinfo, refused
from lazymem.fs.refused import BLOCK_PAGES, MAX_OPEN_PAGES, Refused
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, PageRange

TOTAL = 16 * BLOCK_PAGES
MOUNT = mountinfo.Mount(1, "0:99", "/mnt", "fuse.lazymem", "server", None)
GUEST = 0  # no thread of ours has this id


class FakeFile:
    """The mount's own file, of which each test has a class of its own: the thread of the test before may still close
    its. `mounted`: whether it still is."""

    mounted = True
    opened = closed = 0

    def __init__(self, mounted: mountinfo.Mount) -> None:
        type(self).opened += 1

    def fileno(self) -> int:
        return -1

    def is_mounted(self) -> bool:
        return type(self).mounted

    def close(self) -> None:
        type(self).closed += 1


class Guest:
    """A guest and its kernel: `held` are the pages at hand, `asked` what the kernel was told to take, in order."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.asked: list[PageRange] = []
        self.threads: set[int] = set()
        self.refused = Refused(TOTAL, self.at_hand)

        class File(FakeFile): ...

        self.file: type[FakeFile] = File

    def at_hand(self, offset: int, size: int) -> bool:
        return self.held.issuperset(range(offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT))

    def advise(self, descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            self.threads.add(threading.get_native_id())
            self.asked.append(PageRange(offset >> PAGE_SHIFT, length >> PAGE_SHIFT))

    def touch(self, page: int) -> None:
        self.refused.touched(page << PAGE_SHIFT, PAGE_SIZE)

    def answer(self, pages: PageRange) -> bool:
        (thread,) = self.threads
        return self.refused.takes(thread, pages.offset_bytes, pages.length_bytes)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    found = Guest()
    monkeypatch.setattr(refused, "OwnFile", found.file)
    monkeypatch.setattr(os, "posix_fadvise", found.advise)
    return found


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110  # a thread does it
            await trio.sleep(0.001)


async def running(guest: Guest, nursery: trio.Nursery) -> None:
    nursery.start_soon(guest.refused.run, MOUNT)
    await until(lambda: guest.refused._maybe_advisor is not None)


async def test_the_rest_of_a_touched_block_follows_once_it_is_here(guest: Guest) -> None:
    async with trio.open_nursery() as nursery:
        await running(guest, nursery)
        guest.refused.refuse(PageRange(0, 4 * BLOCK_PAGES))
        guest.held = set(range(BLOCK_PAGES))
        guest.touch(5)
        await until(lambda: len(guest.asked) == 2)
        assert guest.asked == [PageRange(0, 5), PageRange(6, BLOCK_PAGES - 6)], "neither what it has, nor elsewhere"
        guest.touch(BLOCK_PAGES + 1)  # not here yet
        guest.held |= set(range(BLOCK_PAGES, 2 * BLOCK_PAGES))
        await until(lambda: len(guest.asked) == 4)
        assert guest.asked[2:] == [PageRange(BLOCK_PAGES, 1), PageRange(BLOCK_PAGES + 2, BLOCK_PAGES - 2)]
        nursery.cancel_scope.cancel()


async def test_a_read_is_ours_only_if_our_thread_made_the_kernel_send_it(guest: Guest) -> None:
    async with trio.open_nursery() as nursery:
        await running(guest, nursery)
        guest.refused.refuse(PageRange(0, BLOCK_PAGES))
        guest.held = set(range(BLOCK_PAGES))
        guest.touch(0)
        await until(lambda: bool(guest.asked))
        assert not guest.refused.takes(GUEST, PAGE_SIZE, PAGE_SIZE)
        assert not guest.refused.takes(threading.get_native_id(), PAGE_SIZE, PAGE_SIZE)
        assert guest.answer(PageRange(1, BLOCK_PAGES - 1))
        guest.touch(7)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert guest.asked == [PageRange(1, BLOCK_PAGES - 1)], "the kernel has the block"
        nursery.cancel_scope.cancel()


async def test_few_are_open_at_a_time(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a demand finds no more of ours before it."""
    monkeypatch.setattr(refused, "ARRIVAL_SECONDS", 60.0)
    blocks = MAX_OPEN_PAGES // BLOCK_PAGES + 3
    async with trio.open_nursery() as nursery:
        await running(guest, nursery)
        guest.refused.refuse(PageRange(0, TOTAL))
        guest.held = set(range(TOTAL))
        for block in range(blocks):
            guest.touch(block * BLOCK_PAGES)
        await until(lambda: sum(run.count for run in guest.asked) >= MAX_OPEN_PAGES)
        await until(lambda: not guest.refused._maybe_advisor._arrived.is_set())  # type: ignore[union-attr]
        for at in range(blocks):
            await until(lambda at=at: len(guest.asked) > at)  # type: ignore[misc]
            assert sum(run.count for run in guest.asked[at:]) < MAX_OPEN_PAGES + BLOCK_PAGES
            assert guest.answer(guest.asked[at])
        nursery.cancel_scope.cancel()


async def test_a_file_system_is_let_go_of_after_its_unmount(guest: Guest) -> None:
    async with trio.open_nursery() as nursery:
        await running(guest, nursery)
        guest.refused.refuse(PageRange(0, 2 * BLOCK_PAGES))
        guest.held = set(range(TOTAL))
        guest.touch(0)
        await until(lambda: guest.file.opened == guest.file.closed == 1)
        guest.file.mounted = False
        guest.touch(BLOCK_PAGES)
        await until(lambda: guest.file.opened == guest.file.closed == 2)
        assert guest.asked == [PageRange(1, BLOCK_PAGES - 1)]
        nursery.cancel_scope.cancel()


async def test_before_and_after_its_time_nothing_is_given(guest: Guest) -> None:
    """While touches are recorded all is refused, and nothing may be in the kernel that was not touched."""
    guest.refused.refuse(PageRange(0, BLOCK_PAGES))
    guest.held = set(range(TOTAL))
    guest.touch(3)
    async with trio.open_nursery() as nursery:
        await running(guest, nursery)
        assert not guest.asked
        nursery.cancel_scope.cancel()
    guest.touch(4)
    assert not guest.asked
    assert guest.file.opened == 0
