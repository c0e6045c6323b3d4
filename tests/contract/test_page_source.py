"""What every page source promises (`lazymem.store.source.PageSource`), whatever brings its pages."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.errors import LazymemError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, Fetched, PageRange
from lazymem.store.cachefolder import open_cache
from lazymem.store.pristine import PristinePages
from lazymem.store.source import PageSource
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.sources import SOURCES
from tests.support.stores import origin_of

PAGES = 600

ASKED: dict[str, list[PageRange]] = {
    "first page": [PageRange(0, 1)],
    "last page": [PageRange(PAGES - 1, 1)],
    "across leaves": [PageRange(LEAF_PAGES - 1, 2)],
    "one leaf": [PageRange(LEAF_PAGES, LEAF_PAGES)],
    "several": [PageRange(3, 5), PageRange(8, 1), PageRange(300, 40), PageRange(598, 2)],
    "every third": [PageRange(page, 1) for page in range(0, 90, 3)],
    "all": [PageRange(0, PAGES)],
}


@pytest.fixture(params=[True, False], ids=["hashed", "unhashed"])
def snapshot(request: pytest.FixtureRequest, tmp_path: Path) -> BuiltSnapshot:
    return make_snapshot(tmp_path / "snapshot", pages=PAGES, seed=11, hashed=request.param)


@pytest.fixture(params=SOURCES)
async def source(request: pytest.FixtureRequest, snapshot: BuiltSnapshot) -> AsyncIterator[PageSource]:
    async with SOURCES[request.param](snapshot) as opened:
        yield opened


def check(fetched: Fetched, ranges: list[PageRange], snapshot: BuiltSnapshot) -> None:
    """Exactly the pages that were asked for, in order, with the snapshot's bytes; zero pages as None."""
    numbers = [page for run in fetched.runs for page in range(run.pages.start, run.pages.end)]
    assert numbers == [page for pages in ranges for page in range(pages.start, pages.end)]
    for run in fetched.runs:
        right = snapshot.ram[run.pages.offset_bytes : run.pages.offset_bytes + run.pages.length_bytes]
        assert (bytes(run.data) if run.data is not None else bytes(len(right))) == right


@pytest.mark.parametrize("name", ASKED)
async def test_brings_exactly_what_was_asked_for(source: PageSource, snapshot: BuiltSnapshot, name: str) -> None:
    assert source.total_pages == PAGES
    check(await source.fetch(ASKED[name]), ASKED[name], snapshot)


async def test_all_zero_pages_come_without_bytes(source: PageSource, snapshot: BuiltSnapshot) -> None:
    fetched = await source.fetch([PageRange(0, PAGES)])
    zeros = {page for page in range(PAGES) if snapshot.page(page) == ZERO_PAGE}
    assert zeros
    empty = {page for run in fetched.runs if run.data is None for page in range(run.pages.start, run.pages.end)}
    assert empty == zeros


@pytest.mark.parametrize("name", ASKED)
async def test_leaves_come_when_wanted(source: PageSource, snapshot: BuiltSnapshot, name: str) -> None:
    fetched = await source.fetch(ASKED[name], want_leaves=True)
    touched = {page // LEAF_PAGES for pages in ASKED[name] for page in range(pages.start, pages.end)}
    if snapshot.manifest:
        assert {leaf: bytes(fetched.leaves[leaf]) for leaf in touched} == {n: snapshot.leaf(n) for n in touched}
    else:
        assert not fetched.leaves


async def test_without_a_tree_the_source_vouches_for_each_page(source: PageSource, snapshot: BuiltSnapshot) -> None:
    if snapshot.manifest:
        return
    fetched = await source.fetch(ASKED["several"])
    vouched: dict[int, bytes] = {}
    for start, digests in fetched.page_digests.items():
        for index in range(len(digests) // DIGEST_BYTES):
            vouched[start + index] = bytes(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
    for run in fetched.runs:
        for page in range(run.pages.start, run.pages.end):
            right = snapshot.digests[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES]
            # Of a page that comes as zeros the digest is known without being said.
            assert vouched.get(page, right if run.data is None else None) == right


async def test_the_store_accepts_what_it_brings(source: PageSource, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    origin = origin_of(snapshot)
    pristine = PristinePages(origin, open_cache(tmp_path / "cache", origin), snapshot.upper)
    for ranges in ASKED.values():
        fetched = await source.fetch(ranges, want_leaves=any(pristine.missing_leaves(pages) for pages in ranges))
        pristine.accept(fetched)
        await pristine.keep(fetched)
    assert pristine.held_pages == PAGES
    pristine.close()


async def test_many_fetches_at_a_time(source: PageSource, snapshot: BuiltSnapshot) -> None:
    async def one(ranges: list[PageRange], background: bool) -> None:
        check(await source.fetch(ranges, background=background), ranges, snapshot)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for ranges, background in itertools.product(ASKED.values(), (False, True)):
                nursery.start_soon(one, ranges, background)


async def test_a_cancelled_fetch_leaves_the_source_usable(source: PageSource, snapshot: BuiltSnapshot) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await source.fetch(ASKED["all"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.fetch, ASKED["all"])
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    with trio.fail_after(60):
        check(await source.fetch(ASKED["several"]), ASKED["several"], snapshot)


@pytest.mark.parametrize("pages", [PageRange(PAGES, 1), PageRange(PAGES - 1, 2), PageRange(1 << 40, 1)])
async def test_pages_outside_the_ram_are_refused(source: PageSource, snapshot: BuiltSnapshot, pages: PageRange) -> None:
    with trio.fail_after(60):
        with pytest.raises(LazymemError):
            await source.fetch([pages])
        check(await source.fetch([PageRange(0, 1)]), [PageRange(0, 1)], snapshot)


async def test_equal_fetches_bring_equal_answers(source: PageSource) -> None:
    first = await source.fetch(ASKED["several"])
    second = await source.fetch(ASKED["several"])
    assert _whole(first) == _whole(second)


def _whole(fetched: Fetched) -> list[bytes]:
    return [
        bytes(run.data[at : at + PAGE_SIZE]) if run.data is not None else ZERO_PAGE
        for run in fetched.runs
        for at in range(0, run.pages.length_bytes, PAGE_SIZE)
    ]
