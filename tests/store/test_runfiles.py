"""What a run tells as files: the snapshot's digest tree, fetched where it is missing, and what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.errors import VerificationError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import opened_store

PAGES = 2 * LEAF_PAGES + 88


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("built") / "snap", pages=PAGES)


async def test_the_tree_is_the_snapshots_file(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    whole = snapshot.digests + snapshot.upper
    async with opened_store(snapshot, tmp_path / "cache") as store:
        files = store.ram.run_files
        assert files.tree_bytes == len(whole)
        assert await files.read_tree(0, len(whole)) == whole
        assert store.source.fetches == 3  # a page for each leaf, which brings the leaf
        assert await files.read_tree(0, len(whole)) == whole
        assert store.source.fetches == 3


async def test_only_the_leaf_that_is_asked_for_is_fetched(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(snapshot, tmp_path / "cache") as store:
        at = LEAF_PAGES * DIGEST_BYTES
        assert await store.ram.run_files.read_tree(at, at) == snapshot.leaf(1)
        assert store.source.fetches == 1
        upper = await store.ram.run_files.read_tree(len(snapshot.digests), len(snapshot.upper))
        assert upper == snapshot.upper
        assert store.source.fetches == 1


@given(st.data())
def test_any_part(snapshot: BuiltSnapshot, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = snapshot.digests + snapshot.upper
    offset = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(1, len(whole) - offset))
    cache = tmp_path_factory.mktemp("cache")

    async def check() -> None:
        async with opened_store(snapshot, cache) as store:
            assert await store.ram.run_files.read_tree(offset, length) == whole[offset : offset + length]

    trio.run(check)


async def test_what_was_written(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(snapshot, tmp_path / "cache") as store:
        files = store.ram.run_files
        assert files.written_bytes == PAGES
        assert await files.read_written(0, PAGES) == bytes(PAGES)
        await store.ram.write(5 * PAGE_SIZE, ZERO_PAGE * 2)
        await store.ram.write(300 * PAGE_SIZE + 17, b"a part of a page")
        written = await files.read_written(0, PAGES)
        assert [page for page in range(PAGES) if written[page]] == [5, 6, 300]
        assert await files.read_written(6, 2) == written[6:8]
        # The tree stays the snapshot's.
        assert await files.read_tree(0, len(snapshot.digests)) == snapshot.digests


async def test_a_template_and_a_snapshot_that_nobody_hashed(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(snapshot, tmp_path / "cache", template=True) as store:
        assert await store.ram.run_files.read_written(0, PAGES) == bytes(PAGES)
        assert store.ram.written_at(range(0, PAGES, 3)) == bytes(len(range(0, PAGES, 3)))
    bare = make_snapshot(tmp_path / "bare", pages=4, hashed=False)
    async with opened_store(bare, tmp_path / "cache") as store:
        assert store.ram.run_files.tree_bytes == 0
        with pytest.raises(VerificationError, match="no digest tree"):
            await store.ram.run_files.read_tree(0, 16)
