"""Pages that digests prove to be zero: never asked for, always read as zeros, and believed of verified digests only."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, leaf_digest
from lazymem.errors import VerificationError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, Fetched, PageRange, PageRun
from lazymem.store.layers import DamageLayer
from lazymem.store.pagemap import SET_ZERO
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import OpenStore, opened_store

FULL = b"\x5a" * PAGE_SIZE


def ram_of(full: set[int], pages: int) -> bytes:
    """Zeros, but for the pages in `full`."""
    return b"".join(bytes([1 + page % 255]) * PAGE_SIZE if page in full else ZERO_PAGE for page in range(pages))


def snapshot_of(folder: Path, full: set[int], pages: int, *, hashed: bool = True) -> BuiltSnapshot:
    return make_snapshot(folder, ram=ram_of(full, pages), hashed=hashed)


def missing(store: OpenStore) -> set[int]:
    runs = store.pristine.missing_runs(PageRange(0, store.pristine.total_pages))
    return {page for run in runs for page in range(run.start, run.end)}


@pytest.mark.parametrize("last", [1, 40, LEAF_PAGES])
async def test_zero_leaves_are_held_from_the_start(tmp_path: Path, last: int) -> None:
    """Also the last one, which is shorter."""
    pages = 2 * LEAF_PAGES + last
    snapshot = snapshot_of(tmp_path / "snapshot", {LEAF_PAGES + 3}, pages)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert missing(store) == set(range(LEAF_PAGES, 2 * LEAF_PAGES))
        assert store.pristine.held_pages == pages - LEAF_PAGES
        assert not store.pristine.missing_leaves(PageRange(0, LEAF_PAGES))
        assert not store.pristine.missing_leaves(PageRange(2 * LEAF_PAGES, last))
        for page in (0, LEAF_PAGES - 1, 2 * LEAF_PAGES, pages - 1):
            assert await store.ram.read(page * PAGE_SIZE, PAGE_SIZE) == ZERO_PAGE
        assert store.source.fetches == 0
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram


async def test_a_leaf_that_came_makes_its_zero_pages_held(tmp_path: Path) -> None:
    full = {3, 4, LEAF_PAGES - 1, LEAF_PAGES + 7}
    snapshot = snapshot_of(tmp_path / "snapshot", full, LEAF_PAGES + 50)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert await store.ram.read(3 * PAGE_SIZE, PAGE_SIZE) == snapshot.page(3)
        assert missing(store) == {4, LEAF_PAGES - 1, *range(LEAF_PAGES, LEAF_PAGES + 50)}
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert missing(store) == set()
        assert store.source.pages == 3 + 50
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert missing(store) == set()
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.fetches == 0


async def test_of_an_unhashed_snapshot_nothing_is_known_before(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "snapshot", {1}, 300, hashed=False)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert missing(store) == set(range(300))
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.pages == 300


async def test_what_the_guest_wrote_stays(tmp_path: Path) -> None:
    """Before and after the zeros of its leaf become known, and in a leaf that is known to be zero."""
    snapshot = snapshot_of(tmp_path / "snapshot", {3, LEAF_PAGES - 2}, LEAF_PAGES * 2)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.write(10 * PAGE_SIZE, FULL)
        await store.ram.write((LEAF_PAGES + 10) * PAGE_SIZE, FULL)
        await store.ram.write((LEAF_PAGES + 20) * PAGE_SIZE + 5, b"part")
        assert store.source.fetches == 0
        await store.ram.read(3 * PAGE_SIZE, PAGE_SIZE)
        await store.ram.write(11 * PAGE_SIZE, FULL)
        expected = bytearray(snapshot.ram)
        for page in (10, 11, LEAF_PAGES + 10):
            expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = FULL
        at = (LEAF_PAGES + 20) * PAGE_SIZE + 5
        expected[at : at + 4] = b"part"
        assert await store.ram.read(0, len(expected)) == expected


async def test_an_upper_level_that_claims_zeros_is_refused(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "snapshot", {3}, LEAF_PAGES)
    lying = replace(snapshot, upper=leaf_digest(ZERO_PAGE_DIGEST * LEAF_PAGES))
    with pytest.raises(VerificationError):
        async with opened_store(lying, tmp_path / "cache"):
            raise AssertionError("opened")


async def test_a_leaf_that_claims_zeros_marks_nothing(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "snapshot", {3, 9}, LEAF_PAGES)

    def lie(fetched: Fetched) -> Fetched:
        digests = fetched.leaves[0]
        wrong = digests[: 9 * DIGEST_BYTES] + ZERO_PAGE_DIGEST + digests[10 * DIGEST_BYTES :]
        return Fetched(fetched.runs, {0: wrong})

    async with opened_store(snapshot, tmp_path / "cache", over=lambda source: DamageLayer(source, lie)) as store:
        with pytest.raises(VerificationError):
            await store.ram.read(3 * PAGE_SIZE, PAGE_SIZE)
        assert missing(store) == set(range(LEAF_PAGES))


async def test_keeping_what_nobody_accepted_marks_no_zeros(tmp_path: Path) -> None:
    """The store marks by its own verified leaves, not by what an answer carries."""
    snapshot = snapshot_of(tmp_path / "snapshot", {3, 9}, LEAF_PAGES)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.pristine.keep(Fetched((), {0: ZERO_PAGE_DIGEST * LEAF_PAGES}))
        assert missing(store) == set(range(LEAF_PAGES))


async def test_a_map_that_claims_zeros_is_not_believed(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "snapshot", {3, 9}, LEAF_PAGES)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        store.cache.held.set(PageRange(0, LEAF_PAGES), SET_ZERO)
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram


async def test_a_zero_page_on_its_way_when_its_leaf_comes(tmp_path: Path) -> None:
    """Its answer is kept after it became held: counted once."""
    snapshot = snapshot_of(tmp_path / "snapshot", {3}, LEAF_PAGES)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        early = await store.source.fetch([PageRange(20, 5)], want_leaves=True)
        await store.ram.read(3 * PAGE_SIZE, PAGE_SIZE)
        store.pristine.accept(early)
        await store.pristine.keep(early)
        assert store.pristine.held_pages == LEAF_PAGES
        with pytest.raises(VerificationError):
            store.pristine.accept(Fetched((PageRun(PageRange(20, 1), FULL),)))


PAGES = 3 * LEAF_PAGES + 5


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.one_of(st.integers(0, PAGES - 1), st.integers(LEAF_PAGES - 2, LEAF_PAGES + 2)), max_size=12),
    st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 300)), min_size=1, max_size=8),
)
def test_reads_are_right_and_no_page_that_must_be_zero_is_asked_for(
    full: set[int], reads: list[tuple[int, int]]
) -> None:
    async def run(folder: Path) -> None:
        snapshot = snapshot_of(folder / "snapshot", full, PAGES)
        async with opened_store(snapshot, folder / "cache") as store:
            for start, count in reads:
                at, length = start * PAGE_SIZE, count * PAGE_SIZE
                assert await store.ram.read(at, length) == snapshot.ram[at : at + length]
            asked_leaves = {page // LEAF_PAGES for page in full}
            assert missing(store) <= {page for page in range(PAGES) if page // LEAF_PAGES in asked_leaves}

    with tempfile.TemporaryDirectory() as folder:
        trio.run(run, Path(folder))
