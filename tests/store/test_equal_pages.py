"""Pages that are equal to held ones are copied and not fetched, and only where the whole digest says so."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, page_digest
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.store import copies as copies_module
from lazymem.store.cachefolder import PAGES_NAME
from lazymem.store.copies import COPIES_A_WRITE, Copies
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
        equal = copies_of(store).equal
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


async def leaves_are_here(store: OpenStore, leaves: int) -> None:
    for leaf in range(leaves):
        await store.ram.read(leaf * LEAF_PAGES * PAGE_SIZE, 1)


def copies_of(store: OpenStore) -> Copies:
    copies = store.pristine._maybe_copies
    assert copies is not None, "it is a hashed snapshot's"
    return copies


def guesses_of(store: OpenStore, pages: PageRange) -> list[PageRange]:
    missing = list(store.pristine.missing_runs(pages))
    return [part for run in missing for part in store.pristine.worth_fetching(run)]


async def test_what_is_looked_at_again_and_again_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps come back to what is not copied yet, as often as anything is brought; and there is a bound (rule 8)."""
    monkeypatch.setattr(copies_module, "MAX_COPIES", 20)
    snapshot = snapshot_of(tmp_path / "snapshot", [1, *([2] * 99), *([1] * 156)])
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await leaves_are_here(store, 1)
        store.pristine.drop(PageRange(100, 156))  # their like is held, so they were copied at once
        copies = copies_of(store)
        copies.equal.note(PageRange(0, 1), page_digest(page_of(1)))
        for _ in range(3):
            asked = guesses_of(store, PageRange(0, LEAF_PAGES))
            assert len(copies.found) == 20
            assert copies.waiting == sum(map(len, copies._waiting_for.values())) == 20
            assert sum(pages.count for pages in asked) == 99 + 156 - 40, "what is beyond the bound is asked for"


async def test_keeping_copies_a_bounded_number(tmp_path: Path) -> None:
    """Pages that wait to be kept hold up faults in the end."""
    leaves = 4
    snapshot = snapshot_of(tmp_path / "snapshot", [*range(1, leaves + 1), *([77] * (leaves * LEAF_PAGES - leaves))])
    async with opened_store(snapshot, tmp_path / "cache") as store:
        for leaf in range(leaves):
            fetched = await store.source.fetch([PageRange(leaf * LEAF_PAGES + 250, 1)], want_leaves=True)
            store.pristine.accept(fetched)
            if leaf:
                continue
            guesses_of(store, PageRange(4, 200))
        for leaf in range(1, leaves):
            guesses_of(store, PageRange(leaf * LEAF_PAGES, LEAF_PAGES))
        first = await store.source.fetch([PageRange(4, 1)])
        before = store.pristine.held_pages
        await store.pristine.keep(first)
        assert store.pristine.held_pages - before <= 1 + COPIES_A_WRITE
        assert store.pristine.has_copies
        await store.pristine.copy_equal()
        assert not store.pristine.has_copies
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram


async def test_likes_of_a_page_that_the_guest_wrote_are_asked_for(tmp_path: Path) -> None:
    """Nobody guesses that one any more, so it would be waited for in vain, and the sweep would end without them."""
    snapshot = twins(tmp_path / "snapshot")
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await leaves_are_here(store, 2)
        here, like = PageRange(5, 1), PageRange(LEAF_PAGES + 5, 1)
        assert store.pristine.worth_fetching(here) == [here], "and that request fails"
        assert store.pristine.worth_fetching(like) == []
        await store.ram.write(here.offset_bytes, b"\x77" * PAGE_SIZE)
        assert store.pristine.worth_fetching(like) == [like]


async def test_what_only_seemed_equal_is_asked_for_by_the_next_sweep(tmp_path: Path) -> None:
    """Half a digest is easily forged, and a sweep that finds the same copy to make again and again never ends."""
    snapshot = snapshot_of(tmp_path / "snapshot", [*range(1, LEAF_PAGES + 1), *range(1000, 1000 + LEAF_PAGES)])
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await leaves_are_here(store, 2)
        equal = copies_of(store).equal
        pages = PageRange(LEAF_PAGES + 5, 3)
        for page in range(pages.start, pages.end):
            equal.note(PageRange(0, 1), page_digest(snapshot.page(page)))
        assert store.pristine.worth_fetching(pages) == []
        await store.pristine.copy_equal()
        assert store.pristine.none_held(pages)
        assert store.pristine.worth_fetching(pages) == [pages]
        assert not store.pristine.has_copies
