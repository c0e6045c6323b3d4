"""A full disk: what the guest wrote waits and is not lost, the daemon lives, and nothing good is thrown away.

That a failed write-back is forgotten by the kernel was seen on a real mount: the mapper's page went with the next drop
of caches, and older bytes came back without an error.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lazymem.errors import DeadlineError, StoreError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store import guestram, pagefile, room, threads
from lazymem.store.cachefolder import open_cache
from lazymem.store.pagemap import PageMap
from tests.support.snapshots import BuiltSnapshot
from tests.support.stores import opened_store, origin_of


class Disk:
    """Stands before `pwrite_all`; `full` disks refuse with `number`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.full = True
        self.refused = trio.Event()
        self._number = number
        self._real = pagefile.pwrite_all
        self._tries = 0
        monkeypatch.setattr(pagefile, "pwrite_all", self._pwrite_all)
        monkeypatch.setattr(room, "RETRY_SECONDS", 0.001)

    def _pwrite_all(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        if self.full:
            self._tries += 1
            if self._tries == 10:  # in a thread
                trio.from_thread.run_sync(self.refused.set)
            raise OSError(self._number, os.strerror(self._number))
        self._real(fd, data, offset)


def spoil(pages_file: Path, page: int) -> None:
    with open(pages_file, "r+b") as file:
        file.seek(page * PAGE_SIZE)
        file.write(b"wrong")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOLINK, errno.ENOMEM])
async def test_a_write_waits_for_room_or_for_a_dying_disk(
    snapshot: BuiltSnapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        disk = Disk(monkeypatch, number)
        finished = []

        async def write(page: int) -> None:
            await store.ram.write(page * PAGE_SIZE, b"w" * PAGE_SIZE)
            finished.append(page)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, 3)
            nursery.start_soon(write, 5)
            await disk.refused.wait()
            while store.ram.statistics().waiting_writes < 2:  # noqa: ASYNC110  # one may not have been tried yet
                await trio.sleep(0.001)
            assert not finished
            assert store.ram.written_pages == 0
            errors = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert len(errors) == 1
            state = tmp_path / "state"
            what = {
                errno.ENOSPC: f"make room on the disk of {state}",
                errno.EDQUOT: f"make room on the disk of {state}",
                errno.ENOMEM: "needs more memory",
            }
            assert what.get(number, f"look after the disk of {state}") in errors[0].getMessage()
            disk.full = False
        assert sorted(finished) == [3, 5]
        assert await store.ram.read(3 * PAGE_SIZE, PAGE_SIZE) == b"w" * PAGE_SIZE
        assert "any more" in caplog.messages[-1]
        assert store.ram.statistics().waiting_writes == 0


async def test_a_write_that_waits_for_room_can_be_cancelled(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        disk = Disk(monkeypatch, errno.ENOSPC)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.ram.write, 0, b"w" * PAGE_SIZE)
            await disk.refused.wait()
            nursery.cancel_scope.cancel()
        disk.full = False
        assert await store.ram.read(0, PAGE_SIZE) == snapshot.page(0)
        await store.ram.write(0, b"v" * PAGE_SIZE)


async def test_a_file_that_is_too_large_for_its_disk_is_an_error_at_once(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is no state of the disk, and nobody can mend it."""
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        Disk(monkeypatch, errno.EFBIG)
        with pytest.raises(StoreError):
            await store.ram.write(0, b"w" * PAGE_SIZE)


class DyingReads:
    """Stands before `pread_all`; `dying` disks give nothing back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dying = True
        self.refused = trio.Event()
        self._real = pagefile.pread_all
        monkeypatch.setattr(pagefile, "pread_all", self._pread_all)
        monkeypatch.setattr(room, "RETRY_SECONDS", 0.001)

    def _pread_all(self, fd: int, length: int, offset: int) -> bytes:
        if self.dying:
            trio.from_thread.run_sync(self.refused.set)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(fd, length, offset)


async def test_a_written_page_that_the_disk_does_not_give_back_is_waited_for(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would be the guest's death, and the page is nowhere else."""
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        await store.ram.write(0, b"w" * PAGE_SIZE)
        assert store.state
        monkeypatch.setattr(store.state.ram, "maybe_read_nowait", lambda offset, length: None)
        disk = DyingReads(monkeypatch)
        found = []

        async def read() -> None:
            found.append(await store.ram.read(0, PAGE_SIZE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await disk.refused.wait()
            assert not found
            disk.dying = False
        assert found == [b"w" * PAGE_SIZE]
        (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert "look after the disk" in error


async def test_a_deadline_ends_that_wait(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        await store.ram.write(0, b"w" * PAGE_SIZE)
        assert store.state
        monkeypatch.setattr(store.state.ram, "maybe_read_nowait", lambda offset, length: None)
        DyingReads(monkeypatch)
        ram = guestram.GuestRam(store.pristine, store.state, store.demand, deadline_seconds=0.01)
        with pytest.raises(DeadlineError, match="page 0, which the guest wrote"):
            await ram.read(0, PAGE_SIZE)


def test_a_page_map_has_its_room_from_the_start(tmp_path: Path) -> None:
    """On a full tmpfs a look at a hole through a mapping is SIGBUS: the daemon's death."""
    pages = 1 << 20
    fd = os.open(tmp_path / "map", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, pages)
    page_map = PageMap(fd, pages)
    assert os.stat(tmp_path / "map").st_blocks * 512 >= pages
    assert page_map.count == 0
    assert page_map.all_unset(PageRange(0, pages))
    page_map.close()


def test_a_cache_is_not_set_aside_for_want_of_room(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = origin_of(snapshot)
    open_cache(tmp_path / "cache", origin).close()

    def no_room(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(StoreError, match="No space left"):
        open_cache(tmp_path / "cache", origin)
    assert os.listdir(tmp_path / "cache") == [origin.identity.hex()]


@pytest.mark.parametrize("name", ["meta.json", "pages", "map", "digests"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_cache_is_not_set_aside_where_the_host_is_short_of_something(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """A next daemon would begin with an empty one, and all that was fetched would take room for ever."""
    origin = origin_of(snapshot)
    open_cache(tmp_path / "cache", origin).close()
    real_os_open, real_open = os.open, open

    def short(real: Callable[..., Any]) -> Callable[..., Any]:
        def opening(path: Any, *arguments: Any, **named: Any) -> Any:
            if str(path).endswith(f"/{name}"):
                raise OSError(number, os.strerror(number))
            return real(path, *arguments, **named)

        return opening

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", short(real_os_open))
        patched.setattr("builtins.open", short(real_open))
        with pytest.raises(StoreError, match=os.strerror(number)):
            open_cache(tmp_path / "cache", origin)
    assert os.listdir(tmp_path / "cache") == [origin.identity.hex()]


async def test_a_wrong_page_that_cannot_be_dropped_is_fetched_all_the_same(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that copies on write may have no room even to change one byte. The reader needs its page."""
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, len(snapshot.ram))
        page = next(number for number in range(snapshot.pages) if any(snapshot.page(number)))
        spoil(store.cache.path / "pages", page)

        def refuse(pages: PageRange, state: int) -> None:
            raise StoreError("no room")

        monkeypatch.setattr(store.cache.held, "set", refuse)
        monkeypatch.setattr(store.cache.held, "set_many", lambda marks: None)
        assert await store.ram.read(page * PAGE_SIZE, PAGE_SIZE) == snapshot.page(page)


async def test_a_host_without_threads_loses_no_write_and_fails_no_read(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on tasks (a container's, a unit's) is met with a RuntimeError, which ended the task that met it."""
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        real = trio.to_thread.run_sync
        tries = 0
        enough = trio.Event()

        async def no_thread(*arguments: object, **options: object) -> None:
            nonlocal tries
            tries += 1
            if tries == 3:
                enough.set()
            raise RuntimeError("can't start new thread")

        def no_start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(room, "RETRY_SECONDS", 0.001)
        assert await store.ram.read(0, PAGE_SIZE) == snapshot.page(0)
        monkeypatch.setattr(threading.Thread, "start", no_start)
        assert await store.ram.read(0, PAGE_SIZE) == snapshot.page(0)
        monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.ram.write, 0, b"w" * PAGE_SIZE)
            await enough.wait()
            monkeypatch.setattr(trio.to_thread, "run_sync", real)
            monkeypatch.undo()
        assert await store.ram.read(0, PAGE_SIZE) == b"w" * PAGE_SIZE


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
async def test_a_sync_waits_for_a_thread_and_takes_nothing_for_lost(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Wherever in it there is none: the kernel would tell the guest that its pages are not on the disk."""
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        real: Any = trio.to_thread.run_sync
        ended = trio.Event()
        calls = 0

        async def every_other(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls % 2:
                raise error
            return await real(*arguments, **options)

        async def sync() -> None:
            await store.ram.sync()
            ended.set()

        await store.ram.write(0, b"w" * PAGE_SIZE)
        monkeypatch.setattr(threads, "RETRY_SECONDS", 0.001)
        monkeypatch.setattr(trio.to_thread, "run_sync", every_other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            with trio.fail_after(60):
                await ended.wait()
        assert calls >= 6, "what changed, the pages, the map"
        assert store.state is not None
        assert store.state.maybe_synced is not None
        assert not store.state.maybe_synced.has_lost
        assert not store.state.maybe_synced.changes(store.state.written), "all is noted"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EIO])
async def test_a_cached_page_goes_only_with_the_disk_that_has_it(
    snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A host that is short of something says nothing of what is on the disk; the reader has the page either way."""
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, len(snapshot.ram))
        held = store.pristine.held_pages
        with monkeypatch.context() as short:

            def refuse(fd: int, length: int, offset: int) -> bytes:
                raise OSError(number, os.strerror(number))

            short.setattr(pagefile, "pread_all", refuse)
            short.setattr(store.cache.pages, "maybe_read_nowait", lambda offset, length: None)
            assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert (store.pristine.dropped_pages > 0) is (number == errno.EIO)
        assert store.pristine.held_pages == held, "or again, since all was fetched"
