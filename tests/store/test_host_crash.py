"""After a crash of the host: opened with what was synced, or refused, never half-believed.

Each state of the files that the disk may be left in is built here: the kernel writes pages and maps when it likes and
in any order, except for what a sync forces. (tests/system/test_host_crash.py takes the disk away from a real mount.)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lazymem.errors import BusyError, StoreError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store import cachefolder, pagefile, statefolder, syncedmap
from lazymem.store.pagemap import SET
from tests.support.snapshots import BuiltSnapshot
from tests.support.stores import build_store, local_source, opened_store, origin_of

SYNCED, REWRITTEN, LATER = 3, 5, 300
"""Pages: written and synced; synced, and written again; written after the last sync."""


def page_of(value: int) -> bytes:
    return bytes([value]) * PAGE_SIZE


async def write_run(snapshot: BuiltSnapshot, folder: Path) -> None:
    """A run that ends with the host: its folder as the files were in memory then."""
    async with opened_store(snapshot, folder / "cache", folder / "lost") as store:
        for page in (SYNCED, REWRITTEN):
            await store.ram.write(page * PAGE_SIZE, page_of(1))
        await store.ram.sync()
        for page in (REWRITTEN, LATER):
            await store.ram.write(page * PAGE_SIZE, page_of(2))
        shutil.copytree(folder / "lost", folder / "state")


@pytest.fixture
def another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syncedmap, "boot_id", lambda: "of another start")


def put(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def nothing_else(_state: Path) -> None:
    """The disk has all, by chance."""


def later_page_is_a_hole(state: Path) -> None:
    """The map came to the disk, its page did not."""
    put(state / "pc.ram", LATER * PAGE_SIZE, bytes(PAGE_SIZE))


def later_page_is_torn(state: Path) -> None:
    put(state / "pc.ram", LATER * PAGE_SIZE + 512, os.urandom(PAGE_SIZE - 512))


def map_is_behind(state: Path) -> None:
    put(state / "written", LATER, b"\0")


def map_is_as_created(state: Path) -> None:
    size = (state / "written").stat().st_size
    os.truncate(state / "written", 0)
    os.truncate(state / "written", size)


def map_is_empty(state: Path) -> None:
    """Not even its size came to the disk."""
    os.truncate(state / "written", 0)


def map_is_gone(state: Path) -> None:
    (state / "written").unlink()


def map_is_full(state: Path) -> None:
    """Blocks of a file that was deleted before."""
    put(state / "written", 0, b"\1" * (state / "written").stat().st_size)


STATES: dict[str, Callable[[Path], None]] = {
    f.__name__: f
    for f in (
        nothing_else,
        later_page_is_a_hole,
        later_page_is_torn,
        map_is_behind,
        map_is_as_created,
        map_is_empty,
        map_is_gone,
        map_is_full,
    )
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.usefixtures("another_start")
async def test_what_was_synced_is_there_and_nothing_else(
    hashed: BuiltSnapshot, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(syncedmap, "boot_id", lambda: "of the first start")
        await write_run(hashed, tmp_path)
    STATES[name](tmp_path / "state")
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert store.ram.written_pages == 2
        expected = bytearray(hashed.ram)
        for page, value in ((SYNCED, 1), (REWRITTEN, 2)):
            expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = page_of(value)
        assert await store.ram.read(0, len(expected)) == expected
        (notice,) = store.ram.notices
        assert "the host ended while" in notice
        assert notice in caplog.text
        await store.ram.write(7 * PAGE_SIZE, page_of(9))
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert store.ram.written_pages == 3
        assert not store.ram.notices, "closed whole since"


async def test_what_the_map_named_too_much_is_kept_for_who_wants_to_look(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write_run(hashed, tmp_path)
    before = (tmp_path / "state" / "written").read_bytes()
    monkeypatch.setattr(syncedmap, "boot_id", lambda: "of another start")
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert ": 1 pages that were never synced" in store.ram.notices[0]
    assert (tmp_path / "state" / "written.unsynced").read_bytes() == before


async def test_the_death_of_a_daemon_alone_loses_nothing(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    await write_run(hashed, tmp_path)
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert store.ram.written_pages == 3
        assert await store.ram.read(LATER * PAGE_SIZE, PAGE_SIZE) == page_of(2)
        assert not store.ram.notices


async def test_a_folder_that_was_closed_whole_is_whole_in_another_start(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        await store.ram.write(LATER * PAGE_SIZE, page_of(2))
    monkeypatch.setattr(syncedmap, "boot_id", lambda: "of another start")
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert await store.ram.read(LATER * PAGE_SIZE, PAGE_SIZE) == page_of(2)
        assert not store.ram.notices
    assert not caplog.text


@pytest.mark.usefixtures("another_start")
async def test_a_crash_before_anything_was_synced(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then files may not even have their sizes."""
    with monkeypatch.context() as before:
        before.setattr(syncedmap, "boot_id", lambda: "of the first start")
        statefolder.open_state(tmp_path / "state", origin_of(hashed)).close()
    for name in ("pc.ram", "written", "synced"):
        os.truncate(tmp_path / "state" / name, 0)
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert await store.ram.read(0, len(hashed.ram)) == hashed.ram


@pytest.mark.parametrize("name", ["synced", "pc.ram"])
@pytest.mark.parametrize("change", ["missing", "truncated"])
@pytest.mark.usefixtures("another_start")
async def test_what_a_sync_had_made_sure_and_is_not_there_is_refused(
    hashed: BuiltSnapshot, tmp_path: Path, name: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No crash does that: the disk is broken, or somebody was at it."""
    with monkeypatch.context() as before:
        before.setattr(syncedmap, "boot_id", lambda: "of the first start")
        await write_run(hashed, tmp_path)
    if change == "missing":
        (tmp_path / "state" / name).unlink()
    else:
        os.truncate(tmp_path / "state" / name, 100)
    for _ in range(2):
        with pytest.raises(StoreError, match=name):
            statefolder.open_state(tmp_path / "state", origin_of(hashed))


@pytest.mark.parametrize("text", [b"", b"{", b'{"format": "lazymem-state"', b"\0" * 300])
async def test_a_torn_record_is_refused(hashed: BuiltSnapshot, tmp_path: Path, text: bytes) -> None:
    await write_run(hashed, tmp_path)
    (tmp_path / "state" / "state.json").write_bytes(text)
    with pytest.raises(StoreError, match="damaged"):
        statefolder.open_state(tmp_path / "state", origin_of(hashed))


async def test_the_map_is_synced_behind_its_pages(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is written while the others are synced is not among them."""
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        await store.ram.write(SYNCED * PAGE_SIZE, page_of(1))
        real = pagefile._fsync_and_drop

        def sync_and_write(fd: int) -> None:
            assert not any((tmp_path / "state" / "synced").read_bytes()), "not before the pages"
            real(fd)
            trio.from_thread.run(store.ram.write, LATER * PAGE_SIZE, page_of(2))

        with monkeypatch.context() as patched:
            patched.setattr(pagefile, "_fsync_and_drop", sync_and_write)
            await store.ram.sync()
        synced = (tmp_path / "state" / "synced").read_bytes()
        assert (synced[SYNCED], synced[LATER]) == (SET, 0)
        await store.ram.sync()
        assert (tmp_path / "state" / "synced").read_bytes()[LATER] == SET


async def test_a_sync_that_failed_is_never_made_up_for(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of lost pages once, and calls them clean: the next fsync succeeds and means nothing."""
    source = local_source(hashed)
    store = build_store(hashed, tmp_path / "cache", source, tmp_path / "state")
    await store.ram.write(SYNCED * PAGE_SIZE, page_of(1))

    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(pagefile, "_fsync_and_drop", failing)
        with pytest.raises(StoreError, match="Input/output"):
            await store.ram.sync()
    for sync_again in (store.ram.sync, store.ram.close):
        with pytest.raises(StoreError, match="not known any more"):
            await sync_again()
    source.close()
    assert not any((tmp_path / "state" / "synced").read_bytes())
    state = statefolder.open_state(tmp_path / "state", origin_of(hashed))  # as a next daemon, or mount, has it
    with pytest.raises(StoreError, match="not known any more"):
        await state.sync(trio.CapacityLimiter(1))
    state.close()
    monkeypatch.setattr(syncedmap, "boot_id", lambda: "of another start")
    state = statefolder.open_state(tmp_path / "state", origin_of(hashed))
    assert "the host ended while" in state.notices[0]
    await state.sync(trio.CapacityLimiter(1))  # of what was synced: that is known again
    state.close()


async def test_a_failed_sync_that_could_not_be_noted_is_noted_with_the_next_one(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both writes met the full disk. A next daemon has only the record to know it from."""
    state = statefolder.open_state(tmp_path / "state", origin_of(hashed))
    with monkeypatch.context() as full:
        full.setattr(pagefile, "_fsync_and_drop", _refuse)
        full.setattr(os, "rename", _refuse)
        with pytest.raises(StoreError, match="injected"):
            await state.sync(trio.CapacityLimiter(1))
    assert "lost" not in record_of(tmp_path / "state")
    with pytest.raises(StoreError, match="not known any more"):
        await state.sync(trio.CapacityLimiter(1))
    assert "lost" in record_of(tmp_path / "state")
    state.close()


# ---- the cache: nothing of it is believed that does not have its digest


def cache_map_ahead(cache: Path) -> None:
    """Held, says the map; the pages are holes, or what was in their blocks before."""
    size = (cache / "pages").stat().st_size
    os.truncate(cache / "pages", 0)
    os.truncate(cache / "pages", size)
    put(cache / "pages", 40 * PAGE_SIZE, os.urandom(20 * PAGE_SIZE))
    put(cache / "map", 0, b"\1" * (cache / "map").stat().st_size)


def cache_calls_all_zero(cache: Path) -> None:
    put(cache / "map", 0, b"\2" * (cache / "map").stat().st_size)


def cache_digests_are_holes(cache: Path) -> None:
    size = (cache / "digests").stat().st_size
    os.truncate(cache / "digests", 0)
    os.truncate(cache / "digests", size)


def cache_digests_are_cut(cache: Path) -> None:
    os.truncate(cache / "digests", 4096)


def cache_record_is_torn(cache: Path) -> None:
    record = cache / cachefolder.META_NAME
    record.write_bytes(record.read_bytes()[:40])


def cache_record_is_empty(cache: Path) -> None:
    os.truncate(cache / cachefolder.META_NAME, 0)


def cache_files_have_no_size(cache: Path) -> None:
    for name in ("pages", "map", "digests"):
        os.truncate(cache / name, 0)


CACHE_STATES: dict[str, Callable[[Path], None]] = {
    f.__name__: f
    for f in (
        cache_map_ahead,
        cache_calls_all_zero,
        cache_digests_are_holes,
        cache_digests_are_cut,
        cache_record_is_torn,
        cache_record_is_empty,
        cache_files_have_no_size,
    )
}


@pytest.mark.parametrize("name", CACHE_STATES)
async def test_a_cache_that_a_crash_cut_off_shows_right_bytes(
    snapshot: BuiltSnapshot, tmp_path: Path, name: str
) -> None:
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, len(snapshot.ram))
        path = store.cache.path
    CACHE_STATES[name](path)
    for _ in range(2):
        async with opened_store(snapshot, tmp_path / "cache") as store:
            assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram


# ---- where nobody noted in which start of the host a folder was opened


async def older_run(snapshot: BuiltSnapshot, folder: Path) -> None:
    """A folder as before there was a second map."""
    await write_run(snapshot, folder)
    state = folder / "state"
    (state / "synced").unlink()
    record = {key: value for key, value in record_of(state).items() if key not in ("boot", "whole")}
    (state / "state.json").write_text(json.dumps(record))


def record_of(state: Path) -> dict[str, Any]:
    found = json.loads((state / "state.json").read_text())
    assert isinstance(found, dict)
    return found


async def test_an_older_folder_is_not_half_believed(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    """Its map may name pages that a crash lost, and nobody can tell. Who knows better can say so."""
    await older_run(hashed, tmp_path)
    state = tmp_path / "state"
    with pytest.raises(StoreError, match="did not note what was synced") as refused:
        statefolder.open_state(state, origin_of(hashed))
    assert record_of(state).get("boot") is None, "nothing was changed"
    command = re.search(r"cp (\S+) (\S+) believes", str(refused.value))
    assert command
    shutil.copyfile(command[1], command[2])
    (state / "synced").chmod(0o600)
    async with opened_store(hashed, tmp_path / "cache", state) as store:
        assert await store.ram.read(LATER * PAGE_SIZE, PAGE_SIZE) == page_of(2)
        assert store.ram.written_pages == 3
        assert not store.ram.notices


async def test_an_older_folder_without_writes_is_taken(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    state = tmp_path / "state"
    statefolder.open_state(state, origin_of(hashed)).close()
    (state / "synced").unlink()
    record = {key: value for key, value in record_of(state).items() if key not in ("boot", "whole")}
    (state / "state.json").write_text(json.dumps(record))
    async with opened_store(hashed, tmp_path / "cache", state) as store:
        assert await store.ram.read(0, len(hashed.ram)) == hashed.ram


async def test_a_host_that_does_not_say_which_start_it_is(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a boot id a folder that was not closed counts as far as it was synced; one that was, wholly."""
    monkeypatch.setattr(syncedmap, "boot_id", lambda: "")
    await write_run(hashed, tmp_path)
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert store.ram.written_pages == 2
        assert await store.ram.read(LATER * PAGE_SIZE, PAGE_SIZE) == hashed.page(LATER)
        assert "the host may have ended while" in store.ram.notices[0]
        await store.ram.write(LATER * PAGE_SIZE, page_of(4))
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert store.ram.written_pages == 3
        assert await store.ram.read(LATER * PAGE_SIZE, PAGE_SIZE) == page_of(4)
        assert not store.ram.notices


async def test_a_failed_sync_there_is_not_failed_for_ever(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next mount began with what was synced before."""
    monkeypatch.setattr(syncedmap, "boot_id", lambda: "")
    source = local_source(hashed)
    store = build_store(hashed, tmp_path / "cache", source, tmp_path / "state")
    await store.ram.write(0, page_of(1))
    with monkeypatch.context() as dying:
        dying.setattr(pagefile, "_fsync_and_drop", _refuse)
        with pytest.raises(StoreError):
            await store.ram.sync()
    with pytest.raises(StoreError, match="refused written pages before"):
        await store.ram.close()
    source.close()
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert store.ram.written_pages == 0
        await store.ram.write(0, page_of(2))
        await store.ram.sync()


def _refuse(*_: object) -> None:
    raise OSError(errno.EIO, "injected")


# ---- a run that ended while it had no daemon


async def left_alone(snapshot: BuiltSnapshot, folder: Path) -> tuple[Path, int]:
    """Its daemon was killed, and somebody has a copy of its lock."""
    state = statefolder.open_state(folder / "state", origin_of(snapshot))
    lock = os.dup(state.lock_fd)
    await state.store(PageRange(LATER, 1), LATER * PAGE_SIZE, page_of(2))
    state.kept = True
    state.close()
    assert not record_of(folder / "state")["whole"]
    return folder / "state", lock


async def test_it_is_synced_and_whole(hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = await left_alone(hashed, tmp_path)
    statefolder.end_run(path, lock)
    assert record_of(path)["whole"]
    os.close(lock)
    monkeypatch.setattr(syncedmap, "boot_id", lambda: "of another start")
    async with opened_store(hashed, tmp_path / "cache", path) as store:
        assert await store.ram.read(LATER * PAGE_SIZE, PAGE_SIZE) == page_of(2)
        assert not store.ram.notices


async def test_it_is_not_whole_where_it_cannot_be_synced(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = await left_alone(hashed, tmp_path)
    with monkeypatch.context() as dying:
        dying.setattr(os, "fsync", _refuse)
        with pytest.raises(StoreError, match="cannot sync"):
            statefolder.end_run(path, lock)
    assert not record_of(path)["whole"]
    os.close(lock)


async def test_a_folder_that_another_mount_has_by_now_is_left_alone(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    path, lock = await left_alone(hashed, tmp_path)
    fcntl.flock(lock, fcntl.LOCK_UN)
    other = statefolder.open_state(path, origin_of(hashed))
    statefolder.end_run(path, lock)
    assert not record_of(path)["whole"]
    with pytest.raises(BusyError):
        statefolder.open_state(path, origin_of(hashed))
    other.close()
    os.close(lock)
