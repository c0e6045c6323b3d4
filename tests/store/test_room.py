"""Who gives way on a full disk: pages that the run wrote over, other fetched ones, the reserve; and then nobody."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from lazymem.errors import StoreError, UsageError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.settings import RESERVE_ALL_BYTES, parse_reserve
from lazymem.store import fallocate, pagefile, reserve, room, statefolder
from lazymem.store.origin import RamOrigin
from lazymem.store.pagefile import PageFile
from lazymem.store.pagemap import SET, UNSET
from lazymem.store.shedding import Shedder
from lazymem.store.statefolder import adopt_state, open_state, reserve_room
from tests.support.descriptors import open_descriptors
from tests.support.snapshots import BuiltSnapshot
from tests.support.stores import opened_store, origin_of

PAGES = 600


async def test_pages_that_were_written_over_go_first_and_all_of_them_in_the_end(
    hashed: BuiltSnapshot, tmp_path: Path
) -> None:
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        await store.ram.read(0, len(hashed.ram))
        for page in (100, 101, 500):
            await store.ram.write(page * PAGE_SIZE, b"w" * PAGE_SIZE)
        assert store.state
        full = store.cache.held.states(PageRange(0, PAGES)).count(SET)
        over = [page for page in (100, 101, 500) if store.cache.held.states(PageRange(page, 1))[0] == SET]
        shedder = Shedder(store.cache, store.state.written)
        if over:
            assert await shedder.shed(100 * PAGE_SIZE) == len(over) * PAGE_SIZE
            assert all(store.cache.held.states(PageRange(page, 1))[0] == UNSET for page in over)
        before = os.stat(store.cache.path / "pages").st_blocks
        freed = 0
        while some := await shedder.shed(64 * PAGE_SIZE):
            assert some <= 64 * PAGE_SIZE
            freed += some
        assert freed == (full - len(over)) * PAGE_SIZE
        assert os.stat(store.cache.path / "pages").st_blocks < before
        assert store.cache.held.states(PageRange(0, PAGES)).count(SET) == 0
        expected = bytearray(hashed.ram)
        for page in (100, 101, 500):
            expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = b"w" * PAGE_SIZE
        assert await store.ram.read(0, len(expected)) == expected, "what was given up comes again"
        assert await shedder.shed(PAGE_SIZE) == PAGE_SIZE, "and may be given up again"


async def test_a_page_that_goes_while_it_is_read_is_fetched(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    """The map still says held, the page is a hole."""
    async with opened_store(hashed, tmp_path / "cache") as store:
        await store.ram.read(0, len(hashed.ram))
        await store.cache.pages.punch([PageRange(0, PAGES)])
        assert await store.ram.read(0, len(hashed.ram)) == hashed.ram


async def test_where_holes_cannot_be_made_the_write_waits(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        await store.ram.read(0, len(hashed.ram))
        tries = 0
        real = pagefile.pwrite_all

        def full(fd: int, data: bytes | memoryview, offset: int) -> None:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd, data, offset)

        def no_holes(fd: int, offset: int, length: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(pagefile, "pwrite_all", full)
        monkeypatch.setattr(pagefile, "punch", no_holes)
        monkeypatch.setattr(room, "RETRY_SECONDS", 0.001)
        await store.ram.write(0, b"w" * PAGE_SIZE)
        assert caplog.text.count("cannot make room") == 1, "it is not tried again"
        assert "waits" in caplog.text


async def test_fetched_pages_leave_some_of_the_disk_to_others(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = PageFile(os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT, 0o600), "pages")
    real = os.fstatvfs

    def nearly_full(fd: int) -> os.statvfs_result:
        values = list(real(fd))[:10]
        values[0] = values[1] = 4096
        values[2], values[4] = 1 << 20, (pagefile.LEFT_FREE_BYTES >> 12) - 1
        return os.statvfs_result(values)

    await file.write_many([(0, b"x" * PAGE_SIZE)])
    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    with pytest.raises(StoreError, match="but for what guests write"):
        await file.write_many([(0, b"y" * PAGE_SIZE)])
    await file.write(0, b"z" * PAGE_SIZE)
    assert await file.read(0, PAGE_SIZE) == b"z" * PAGE_SIZE
    file.close()


# ---- the reserve


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_reserve_is_given_in_steps_and_goes_with_the_mount(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    origin = origin_of(hashed)
    state = open_state(tmp_path / "state", origin)
    reserve_room(state, origin, 1 << 20)
    assert state.reserve
    file = tmp_path / "state" / "reserve"
    assert blocks(file) >= 1 << 20
    assert state.reserve.give(300_000) == 300_000
    assert state.reserve.give(1 << 30) == (1 << 20) - 300_000
    assert state.reserve.give(1) == 0
    assert blocks(file) == 0
    state.close()
    assert not file.exists()


def test_a_next_daemon_has_what_is_left(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    origin = origin_of(hashed)
    state = open_state(tmp_path / "state", origin)
    reserve_room(state, origin, 1 << 20)
    assert state.reserve
    state.reserve.give(1 << 19)
    lock = os.dup(state.lock_fd)
    state.kept = True
    state.close()
    after = adopt_state(tmp_path / "state", origin, lock, private=False)
    assert after.reserve
    assert after.reserve.bytes_left == 1 << 19
    after.close()


async def test_what_is_written_counts_in(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        for page in range(100):
            await store.ram.write(page * PAGE_SIZE, b"w" * PAGE_SIZE)
    origin = origin_of(hashed)
    state = open_state(tmp_path / "state", origin)
    reserve_room(state, origin, 1 << 20)
    assert state.reserve
    assert state.reserve.bytes_left <= (1 << 20) - 100 * PAGE_SIZE
    state.close()


def test_a_failed_reserve_takes_nothing(hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system allocates some, then finds that there is no more."""
    origin = origin_of(hashed)
    state = open_state(tmp_path / "state", origin)

    def some(fd: int, length: int) -> None:
        fallocate.allocate(fd, length // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reserve, "allocate", some)
    for wanted in (1 << 20, RESERVE_ALL_BYTES):
        with pytest.raises(StoreError, match="cannot reserve"):
            reserve_room(state, origin, wanted)
        assert blocks(tmp_path / "state" / "reserve") == blocks(tmp_path / "state" / "pc.ram") == 0
    state.close()


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("all", RESERVE_ALL_BYTES), ("512M", 512 << 20), ("2g", 2 << 30), ("7K", 7 << 10)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_reserve(text) == size


@pytest.mark.parametrize("text", ["", "5", "M", "-1M", "1.5G", "512MB", "all of it", "1" * 12 + "G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="say how much"):
        parse_reserve(text)


# ---- the default, where there is little room


def with_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """The disk says that it has so much left."""
    real = os.fstatvfs

    def found(fd: int) -> os.statvfs_result:
        size = real(fd).f_frsize
        words = list(real(fd))
        words[3] = words[4] = free_bytes // size
        return os.statvfs_result(words)

    monkeypatch.setattr(os, "fstatvfs", found)


@pytest.mark.parametrize(("free_mib", "taken_mib"), [(500, 64), (128, 64), (126, 63), (41, 20), (3, 1), (1, 0), (0, 0)])
def test_the_default_leaves_as_much_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mib: int, taken_mib: int
) -> None:
    origin = RamOrigin(b"i" * 32, 1 << 30, None)
    monkeypatch.setattr(statefolder, "is_in_memory", lambda _: False)
    state = open_state(tmp_path / "state", origin)
    with_free(monkeypatch, free_mib << 20)
    reserve_room(state, origin, None)
    assert (state.reserve.bytes_left if state.reserve else 0) == taken_mib << 20
    assert len(state.notices) == (taken_mib < 64)
    assert all(f"{taken_mib} MiB are reserved for what the guest writes, not 64" in said for said in state.notices)
    state.close()


@pytest.mark.parametrize("wanted", [None, 2 << 20])
def test_a_disk_that_does_not_say_what_is_there(
    wanted: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then nothing is reserved, which who named a size is told as an error."""
    state = open_state(tmp_path / "state", RamOrigin(b"i" * 32, 1 << 30, None))
    before = open_descriptors(collect=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", _refusing)
        with pytest.raises(StoreError, match="cannot look") if wanted else contextlib.nullcontext():
            reserve_room(state, RamOrigin(b"i" * 32, 1 << 30, None), wanted)
        with pytest.raises(StoreError, match="cannot look"):
            reserve.go_on_with(state.path)
    assert state.reserve is None
    assert open_descriptors() == before
    state.close()


def _refusing(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_what_was_asked_for_is_taken_to_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who names a size wants it."""
    origin = RamOrigin(b"i" * 32, 1 << 30, None)
    state = open_state(tmp_path / "state", origin)
    with_free(monkeypatch, 2 << 20)
    reserve_room(state, origin, 2 << 20)
    assert state.reserve
    assert state.reserve.bytes_left == 2 << 20
    state.close()


async def test_a_reserve_that_cannot_be_given_is_said_once(
    hashed: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again with each write that waits, twice a second, for as long as the disk is full."""
    origin = origin_of(hashed)
    async with opened_store(hashed, tmp_path / "cache", tmp_path / "state") as store:
        assert store.state
        reserve_room(store.state, origin, 1 << 20)
        assert store.state.reserve
        tries = 0
        real = pagefile.pwrite_all

        def full(fd: int, data: bytes | memoryview, offset: int) -> None:
            nonlocal tries
            tries += 1
            if tries < 30:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd, data, offset)

        def refuse(_most_bytes: int) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(pagefile, "pwrite_all", full)
        monkeypatch.setattr(store.state.reserve, "give", refuse)
        monkeypatch.setattr(room, "RETRY_SECONDS", 0.001)
        await store.ram.write(0, b"w" * PAGE_SIZE)
        assert caplog.text.count("cannot be used") == 1
        assert tries == 30
