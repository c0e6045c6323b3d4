"""GuestRam: reading and writing as one would a plain file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lazymem.errors import StoreError, TemplateWriteError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.pristine import PristinePages
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import opened_store


async def test_reads_are_the_snapshots_bytes(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    size = len(snapshot.ram)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        for offset, length in ((0, 1), (4095, 2), (123456, 70000), (size - 10, 100), (0, size), (size, 5)):
            assert await store.ram.read(offset, length) == snapshot.ram[offset : offset + length]
        assert store.ram.held_pages == store.ram.total_pages == snapshot.pages


async def test_a_held_page_is_not_fetched_again_and_not_by_the_next_mount(
    snapshot: BuiltSnapshot, tmp_path: Path
) -> None:
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, len(snapshot.ram))
        before = store.source.fetches
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.fetches == before
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.fetches == 0


async def test_writes_are_read_back_and_leave_the_cache_alone(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    model = bytearray(snapshot.ram)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        for offset, length in ((0, PAGE_SIZE), (10, 20), (5 * PAGE_SIZE - 3, 7), (9 * PAGE_SIZE + 1, 3 * PAGE_SIZE)):
            data = bytes([offset % 251 + 1]) * length
            await store.ram.write(offset, data)
            model[offset : offset + length] = data
            assert await store.ram.read(0, len(model)) == model
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert await store.ram.read(0, len(model)) == snapshot.ram
        assert store.ram.written_pages == 0


async def test_a_state_folder_goes_on_where_it_was(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(snapshot, tmp_path / "cache", tmp_path / "state") as store:
        await store.ram.write(4000, b"written" * 100)
        written = store.ram.written_pages
    async with opened_store(snapshot, tmp_path / "other cache", tmp_path / "state") as store:
        assert store.ram.written_pages == written == 2
        assert await store.ram.read(4000, 700) == b"written" * 100
        assert await store.ram.read(0, 4000) == snapshot.ram[:4000]


async def test_a_whole_page_is_written_without_fetching_it(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.write(PAGE_SIZE, bytes(2 * PAGE_SIZE))
        assert store.source.fetches == 0
        assert await store.ram.read(PAGE_SIZE, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)


async def test_a_template_refuses_writes(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(snapshot, tmp_path / "cache", template=True) as store:
        with pytest.raises(TemplateWriteError):
            await store.ram.write(0, b"x")
        assert await store.ram.read(0, 100) == snapshot.ram[:100]
        await store.ram.sync()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (600 * PAGE_SIZE, 1), (600 * PAGE_SIZE - 1, 2)])
async def test_a_write_beyond_the_ram_is_refused(
    snapshot: BuiltSnapshot, tmp_path: Path, offset: int, length: int
) -> None:
    async with opened_store(snapshot, tmp_path / "cache") as store:
        with pytest.raises(StoreError):
            await store.ram.write(offset, bytes(length))
        assert store.ram.written_pages == 0


async def test_what_comes_while_a_held_page_is_read_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess may bring it meanwhile; asked for once more, it would keep the reader for another round trip."""
    snapshot = make_snapshot(tmp_path / "snapshot", ram=random.Random(1).randbytes(8 * PAGE_SIZE))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, PAGE_SIZE)
        really = PristinePages.read

        async def read(pristine: PristinePages, pages: PageRange) -> tuple[bytes, list[PageRange]]:
            if pages == PageRange(0, 1):
                await store.ram.read(PAGE_SIZE, PAGE_SIZE)
            return await really(pristine, pages)

        monkeypatch.setattr(PristinePages, "read", read)
        monkeypatch.setattr(PristinePages, "maybe_read_nowait", lambda pristine, pages: None)  # not at hand
        before = store.source.fetches
        assert await store.ram.read(0, 2 * PAGE_SIZE) == snapshot.ram[: 2 * PAGE_SIZE]
        assert store.source.fetches == before + 1
