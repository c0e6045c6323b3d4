"""One operation fails, the first, then the second, until none fails: each time the store is as right as before.

Of the source's fetches, and of all that is done to the disk. After SQLite's `do_ioerr_test`.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.errors import LazymemError, ServerUnreachableError, StoreError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.cachefolder import open_cache
from lazymem.store.directdemand import DirectDemand
from lazymem.store.guestram import GuestRam
from lazymem.store.layers import ErrorLayer
from lazymem.store.pagefile import PageFile
from lazymem.store.pagemap import PageMap
from lazymem.store.pristine import PristinePages
from lazymem.store.statefolder import open_state
from tests.support.snapshots import BuiltSnapshot
from tests.support.stores import local_source, opened_store, origin_of

MANY = 200
"""More operations than the work below does."""


async def work(ram: GuestRam, model: bytearray, failed: Callable[[LazymemError], None]) -> None:
    """Reads and writes of all kinds; a failed one is told and tried again, as the kernel or the guest would."""

    async def read(offset: int, length: int) -> None:
        try:
            data = await ram.read(offset, length)
        except LazymemError as error:
            failed(error)
            data = await ram.read(offset, length)
        assert data == model[offset : offset + length]

    async def write(offset: int, data: bytes) -> None:
        try:
            await ram.write(offset, data)
        except LazymemError as error:
            failed(error)
            await ram.write(offset, data)
        model[offset : offset + len(data)] = data

    await read(0, 10 * PAGE_SIZE)
    await write(3 * PAGE_SIZE, b"w" * PAGE_SIZE)
    await write(30 * PAGE_SIZE + 10, b"p" * (2 * PAGE_SIZE))
    await write(3 * PAGE_SIZE + 7, b"again")
    await read(2 * PAGE_SIZE, 32 * PAGE_SIZE)
    await read(252 * PAGE_SIZE, 8 * PAGE_SIZE)
    await write(599 * PAGE_SIZE - 5, b"e" * 10)
    await read(590 * PAGE_SIZE, 10 * PAGE_SIZE)


async def test_each_fetch_fails_once(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    for number in itertools.count():
        assert number < MANY
        errors: list[LazymemError] = []
        model = bytearray(snapshot.ram)
        layers: list[ErrorLayer] = []

        def failing(source: object, nth: int = number, made: list[ErrorLayer] = layers) -> ErrorLayer:
            made.append(ErrorLayer(source, range(nth, nth + 1)))  # type: ignore[arg-type]
            return made[0]

        cache, state = tmp_path / f"cache{number}", tmp_path / f"state{number}"
        async with opened_store(snapshot, cache, state, over=failing) as store:
            await work(store.ram, model, errors.append)
        async with opened_store(snapshot, cache, state) as store:
            assert await store.ram.read(0, len(model)) == model
        assert all(isinstance(error, ServerUnreachableError) for error in errors)
        if layers[0].fetches <= number:
            assert not errors
            assert number > 5
            return
        assert len(errors) == 1


class Disk:
    """Counts what is done to the files below; the one with number `failing` does not happen."""

    def __init__(self, failing: int) -> None:
        self.failing = failing
        self.done = 0

    def step(self) -> None:
        number = self.done
        self.done += 1
        if number == self.failing:
            raise StoreError("injected: " + os.strerror(errno.ENOSPC))


class FailingFile(PageFile):
    def __init__(self, fd: int, disk: Disk) -> None:
        super().__init__(fd, "injected")
        self._disk = disk

    def maybe_read_nowait(self, offset: int, length: int) -> bytes | None:
        return None  # every read is one that may fail

    async def read(self, offset: int, length: int) -> bytes:
        self._disk.step()
        return await super().read(offset, length)

    async def write(self, offset: int, data: bytes | memoryview, then: Callable[[], None] | None = None) -> None:
        try:
            self._disk.step()
        except StoreError:
            await super().write(offset, data[: len(data) // 2])  # a disk that fills up takes a part
            raise
        await super().write(offset, data, then)

    async def write_many(self, pieces: list[tuple[int, bytes | memoryview]]) -> None:
        try:
            self._disk.step()
        except StoreError:
            await super().write_many(pieces[: len(pieces) // 2])
            raise
        await super().write_many(pieces)


class FailingMap(PageMap):
    def __init__(self, fd: int, pages: int, disk: Disk) -> None:
        super().__init__(fd, pages)
        self._disk = disk

    def set(self, pages: PageRange, state: int) -> None:
        self._disk.step()
        super().set(pages, state)

    def set_uncounted(self, pages: PageRange, state: int) -> None:
        self._disk.step()
        super().set_uncounted(pages, state)


@pytest.mark.parametrize("broken", ["cache", "state"])
async def test_each_disk_operation_fails_once(snapshot: BuiltSnapshot, tmp_path: Path, broken: str) -> None:
    origin = origin_of(snapshot)
    for number in itertools.count():
        assert number < MANY
        disk = Disk(number)
        errors: list[LazymemError] = []
        model = bytearray(snapshot.ram)
        source = local_source(snapshot)
        cache, state = open_cache(tmp_path / f"cache{number}", origin), open_state(tmp_path / f"state{number}", origin)
        opened = cache if broken == "cache" else state
        unused = cache.pages if broken == "cache" else state.ram
        page_map = cache.held if broken == "cache" else state.written
        ram_path, map_path = (
            (cache.path / "pages", cache.path / "map")
            if broken == "cache"
            else (state.path / "pc.ram", state.path / "written")
        )
        failing_file = FailingFile(os.open(ram_path, os.O_RDWR | os.O_CLOEXEC), disk)
        failing_map = FailingMap(os.open(map_path, os.O_RDWR | os.O_CLOEXEC), origin.pages, disk)
        unused.close()
        page_map.close()
        if opened is cache:
            cache = replace(cache, pages=failing_file, held=failing_map)
        else:
            state.ram, state.written = failing_file, failing_map
        pristine = PristinePages(origin, cache, snapshot.upper, state.written)
        ram = GuestRam(pristine, state, DirectDemand(source, pristine))
        await work(ram, model, errors.append)
        used = disk.done
        await ram.close()
        source.close()
        # And what a next mount finds is right as well.
        async with opened_store(snapshot, tmp_path / f"cache{number}", tmp_path / f"state{number}") as store:
            assert await store.ram.read(0, len(model)) == model
        assert len(errors) <= 1
        assert all("injected" in str(error) for error in errors)
        if used <= number:
            assert not errors
            assert number > 5
            return
