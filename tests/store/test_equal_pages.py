"""Pages that are equal to held ones are copied and not fetched, and only where the whole digest says so."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from pathlib import Path

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, page_digest
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store.cachefolder import PAGES_NAME
from lazymem.store.equalpages import EqualPages
from lazymem.store.pagemap import SET
from lazymem.store.pristine import COPIES_PAY_BELOW_BYTES_PER_SECOND
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import OpenStore, opened_store

TWO_LEAVES = 2 * LEAF_PAGES


def page_of(kind: int) -> bytes:
    """Kind 0 is a zero page."""
    return bytes(PAGE_SIZE) if kind == 0 else random.Random(kind).randbytes(PAGE_SIZE)


def snapshot_of(folder: Path, kinds: list[int], *, hashed: bool = True) -> BuiltSnapshot:
    return make_snapshot(folder, ram=b"".join(page_of(kind) for kind in kinds), hashed=hashed)


def twins(folder: Path, *, hashed: bool = True) -> BuiltSnapshot:
    """Two leaves with the same pages, all different inside of each."""
    return snapshot_of(folder, [*range(1, LEAF_PAGES + 1)] * 2, hashed=hashed)


async def read_all(store: OpenStore, leaf: int) -> bytes:
    return await store.ram.read(leaf * LEAF_PAGES * PAGE_SIZE, LEAF_PAGES * PAGE_SIZE)


async def test_a_leaf_of_held_pages_is_copied(tmp_path: Path) -> None:
    snapshot = twins(tmp_path / "snapshot")
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await read_all(store, 0)
        assert store.pristine.held_pages == store.source.pages == LEAF_PAGES
        await store.ram.read((LEAF_PAGES + 5) * PAGE_SIZE, 1)  # brings the leaf
        assert store.pristine.held_pages == TWO_LEAVES
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.pages == LEAF_PAGES + 1
        assert store.pristine.dropped_pages == 0
    async with opened_store(snapshot, tmp_path / "cache") as store:  # the copies are in the file
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.fetches == 0


async def test_where_the_wire_is_fast_nothing_is_copied(tmp_path: Path) -> None:
    snapshot = twins(tmp_path / "snapshot")
    async with opened_store(snapshot, tmp_path / "cache") as store:
        store.pristine.wire_bytes_per_second = lambda: COPIES_PAY_BELOW_BYTES_PER_SECOND
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.pages == TWO_LEAVES


async def test_of_an_unhashed_snapshot_nothing_is_copied(tmp_path: Path) -> None:
    snapshot = twins(tmp_path / "snapshot", hashed=False)
    async with opened_store(snapshot, tmp_path / "cache") as store:
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.pages == TWO_LEAVES


async def test_damage_is_not_copied(tmp_path: Path) -> None:
    snapshot = twins(tmp_path / "snapshot")
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await read_all(store, 0)
        (file,) = (tmp_path / "cache").rglob(PAGES_NAME)
        fd = os.open(file, os.O_WRONLY)
        try:
            os.pwrite(fd, b"damage", 7 * PAGE_SIZE)
        finally:
            os.close(fd)
        await store.ram.read((LEAF_PAGES + 5) * PAGE_SIZE, 1)
        assert store.pristine.dropped_pages == 1
        assert store.pristine.held_pages == TWO_LEAVES - 2
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram


async def test_what_the_guest_wrote_is_neither_copied_nor_lost(tmp_path: Path) -> None:
    snapshot = twins(tmp_path / "snapshot")
    written = b"\x77" * PAGE_SIZE
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await read_all(store, 0)
        await store.ram.write(9 * PAGE_SIZE, written)
        await store.ram.write((LEAF_PAGES + 10) * PAGE_SIZE, written)
        await store.ram.read((LEAF_PAGES + 5) * PAGE_SIZE, 1)
        expected = bytearray(snapshot.ram)
        for page in (9, LEAF_PAGES + 10):
            expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = written
        assert await store.ram.read(0, len(expected)) == expected


def test_half_a_digest_is_only_a_candidate() -> None:
    """So the store has to compare the rest: see `test_the_whole_digest_counts`."""
    equal = EqualPages(slots=16)
    held = struct.pack("<QQ", 3, 1)
    equal.note(PageRange(40, 1), held)
    assert list(equal.candidates(50, struct.pack("<QQ", 3, 2))) == [(50, 40)]
    assert list(equal.candidates(50, struct.pack("<QQ", 19, 1))) == []  # same slot
    assert list(equal.candidates(40, held)) == []
    assert list(equal.candidates(50, bytes(DIGEST_BYTES) + ZERO_PAGE_DIGEST)) == []


async def test_the_whole_digest_counts(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "snapshot", [*range(1, LEAF_PAGES + 1), *range(1000, 1000 + LEAF_PAGES)])
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await read_all(store, 0)
        equal = store.pristine._maybe_equal
        assert equal is not None
        for page in range(LEAF_PAGES):  # a table of lies
            equal.note(PageRange(page, 1), page_digest(snapshot.page(LEAF_PAGES + page)))
        await store.ram.read((LEAF_PAGES + 5) * PAGE_SIZE, 1)
        assert store.pristine.held_pages == LEAF_PAGES + 1
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram


def test_a_full_table_keeps_what_came_last() -> None:
    equal = EqualPages(slots=4)
    digests = [struct.pack("<QQ", key, 0) for key in range(1, 9)]
    equal.note(PageRange(0, 8), b"".join(digests))
    assert list(equal.candidates(100, b"".join(digests))) == [(104 + index, 4 + index) for index in range(4)]


PAGES = 2 * LEAF_PAGES + 9


@settings(max_examples=25, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 200)), min_size=1, max_size=12),
)
def test_random_images(choose: random.Random, kinds: int, reads: list[tuple[int, int]]) -> None:
    """Few kinds of pages, in any places, read in any order."""
    image = [choose.randrange(kinds) for _ in range(PAGES)]

    async def run(folder: Path) -> None:
        snapshot = snapshot_of(folder / "snapshot", image)
        async with opened_store(snapshot, folder / "cache") as store:
            for start, count in reads:
                at = start * PAGE_SIZE
                assert await store.ram.read(at, count * PAGE_SIZE) == snapshot.ram[at : at + count * PAGE_SIZE]
            assert store.pristine.dropped_pages == 0

    with tempfile.TemporaryDirectory() as folder:
        trio.run(run, Path(folder))


async def test_guesses_ask_for_one_of_equal_pages(tmp_path: Path) -> None:
    """Within a request, across requests that are on their way, and of what is held."""
    snapshot = snapshot_of(
        tmp_path / "snapshot", [*range(1, 101), *range(1, 101), *([7] * 56), *range(1, LEAF_PAGES + 1)]
    )
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, 1)
        await store.ram.read(LEAF_PAGES * PAGE_SIZE, 1)  # both leaves are here
        pristine = store.pristine
        missing = [run for start in range(0, TWO_LEAVES, 64) for run in pristine.missing_runs(PageRange(start, 64))]
        asked = [part for run in missing for part in pristine.worth_fetching(run)]
        wanted = [page for pages in asked for page in range(pages.start, pages.end)]
        kinds = [snapshot.page(page) for page in wanted]
        assert len(set(kinds)) == len(kinds) == LEAF_PAGES - 1, "each once, and the held one not at all"
        for page in wanted:
            await store.ram.read(page * PAGE_SIZE, PAGE_SIZE)
        await pristine.copy_equal()
        assert pristine.held_pages == TWO_LEAVES, "what waited for another's arrival was copied from it"
        before = store.source.pages
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.pages == before


async def test_what_waits_for_a_page_that_never_comes_is_asked_for_by_the_next_sweep(tmp_path: Path) -> None:
    snapshot = twins(tmp_path / "snapshot")
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, 1)
        await store.ram.read(LEAF_PAGES * PAGE_SIZE, 1)
        pristine = store.pristine
        first = PageRange(1, 4)
        assert pristine.worth_fetching(first) == [first], "and that request fails"
        assert pristine.worth_fetching(PageRange(LEAF_PAGES + 1, 4)) == []
        assert pristine.worth_fetching(first) == [first], "it is asked for again, and its like is then copied"
        await store.ram.read(PAGE_SIZE, 4 * PAGE_SIZE)
        await pristine.copy_equal()
        assert pristine.states(PageRange(LEAF_PAGES + 1, 4)) == bytes([SET] * 4)
