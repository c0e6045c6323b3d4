"""Rule 12: which pages of the cache's file are named to be let go of once the guest's kernel has got them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazymem.pages import PAGE_SIZE, ZERO_PAGE, PageRange
from lazymem.store.pagefile import BLOCK_PAGES
from lazymem.store.pagemap import SET_ZERO
from tests.support.snapshots import make_snapshot
from tests.support.stores import OpenStore, opened_store

BLOCK = PageRange(BLOCK_PAGES, BLOCK_PAGES)
"""The second of three."""


def ram_of(zero: range) -> bytes:
    pages = range(3 * BLOCK_PAGES)
    return b"".join(ZERO_PAGE if page in zero else bytes([1 + page]) * PAGE_SIZE for page in pages)


def named_by(store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> list[PageRange]:
    named: list[PageRange] = []
    monkeypatch.setattr(store.pristine.cache.pages, "let_go", named.append)
    return named


async def give(store: OpenStore, pages: PageRange) -> None:
    """Fetched, if it has to be, and read by the guest's kernel."""
    await store.ram.read(pages.offset_bytes, pages.length_bytes)


async def test_what_is_still_to_come_is_not_let_go_of_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named is asked for a second later once more, and what came meanwhile nobody has read."""
    snapshot = make_snapshot(tmp_path / "snapshot", ram=ram_of(range(0)))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        named = named_by(store, monkeypatch)
        first = PageRange(BLOCK.start + 3, 1)
        await give(store, first)
        assert named == [first]


async def test_a_block_is_let_go_of_when_the_last_of_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", ram=ram_of(range(0)))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await give(store, PageRange(BLOCK.start, BLOCK.count - 1))
        named = named_by(store, monkeypatch)
        await give(store, PageRange(BLOCK.end - 1, 1))
        assert named == [BLOCK]


async def test_nobody_waits_for_zero_pages_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no bytes in the file, and the guest's kernel may never ask for them."""
    zero = range(BLOCK.start + 8, BLOCK.end)
    snapshot = make_snapshot(tmp_path / "snapshot", ram=ram_of(zero))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await give(store, PageRange(BLOCK.start, 7))
        named = named_by(store, monkeypatch)
        await give(store, PageRange(BLOCK.start + 7, 1))
        assert named == [BLOCK]


async def test_nobody_waits_for_what_the_guest_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never fetched, and read from the file of written pages."""
    snapshot = make_snapshot(tmp_path / "snapshot", ram=ram_of(range(0)))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.write(BLOCK.offset_bytes, b"w" * PAGE_SIZE)
        await give(store, PageRange(BLOCK.start + 1, BLOCK.count - 2))
        named = named_by(store, monkeypatch)
        await give(store, PageRange(BLOCK.end - 1, 1))
        assert named == [BLOCK]


async def test_a_zero_page_is_given_without_naming_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", ram=ram_of(range(BLOCK.start, BLOCK.end)))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await give(store, BLOCK)
        named = named_by(store, monkeypatch)
        assert store.ram.read_soon(BLOCK.offset_bytes, PAGE_SIZE, lambda answer: None) == ZERO_PAGE
        assert named == []


async def test_a_page_that_only_the_map_calls_zero_is_not_believed(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", ram=ram_of(range(0)))
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await give(store, BLOCK)
        store.pristine.cache.held.set(PageRange(BLOCK.start, 1), SET_ZERO)
        assert store.ram.read_soon(BLOCK.offset_bytes, PAGE_SIZE, lambda answer: None) is False
        assert await store.ram.read(BLOCK.offset_bytes, PAGE_SIZE) == snapshot.page(BLOCK.start)
