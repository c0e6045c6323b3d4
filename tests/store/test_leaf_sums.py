"""A leaf that comes whole is verified by its sum; what is not whole, or not right, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, sums_digest
from lazymem.errors import VerificationError
from lazymem.pages import PAGE_SIZE, Fetched, PageRange, PageRun, runs
from lazymem.store.cachefolder import open_cache
from lazymem.store.pristine import PristinePages
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import origin_of

PAGES = 2 * LEAF_PAGES + 40  # the last leaf is short


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> BuiltSnapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), PAGES, seed=4)


@contextmanager
def opened(snapshot: BuiltSnapshot, cache: Path, sums: bytes | None = None) -> Iterator[PristinePages]:
    """`sums`: in place of the snapshot's, as if its manifest named them."""
    sums = snapshot.sums if sums is None else sums
    origin = origin_of(snapshot)
    pristine = PristinePages(origin, open_cache(cache, origin), snapshot.upper)
    pristine.know_sums(sums, sums_digest(sums))
    yield pristine
    pristine.close()


def is_zero(snapshot: BuiltSnapshot, page: int) -> bool:
    return snapshot.digests[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES] == ZERO_PAGE_DIGEST


def answer(snapshot: BuiltSnapshot, pages: list[int]) -> Fetched:
    """As a server gives it: zero pages as such, and the leaves' digests."""
    full = runs(page for page in pages if not is_zero(snapshot, page))
    found = [PageRun(run, snapshot.ram[run.offset_bytes :][: run.length_bytes]) for run in _in_leaves(full)]
    found += [PageRun(run, None) for run in _in_leaves(runs(page for page in pages if is_zero(snapshot, page)))]
    found.sort(key=lambda run: run.pages.start)
    leaves = {leaf: snapshot.leaf(leaf) for leaf in {page // LEAF_PAGES for page in pages}}
    return Fetched(tuple(found), leaves)


def _in_leaves(ranges: list[PageRange]) -> list[PageRange]:
    return [
        PageRange(start, end - start)
        for pages in ranges
        for leaf in range(pages.start // LEAF_PAGES, (pages.end - 1) // LEAF_PAGES + 1)
        for start in [max(pages.start, leaf * LEAF_PAGES)]
        for end in [min(pages.end, (leaf + 1) * LEAF_PAGES)]
    ]


def changed(fetched: Fetched, at: int) -> Fetched:
    """Another last byte in its run number `at`."""
    found = list(fetched.runs)
    data = bytes(found[at].data or b"")
    found[at] = PageRun(found[at].pages, data[:-1] + bytes([data[-1] ^ 1]))
    return replace(fetched, runs=tuple(found))


def full_runs(fetched: Fetched) -> list[int]:
    return [at for at, run in enumerate(fetched.runs) if run.data is not None]


async def test_all_of_it_is_kept(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    whole = answer(snapshot, list(range(PAGES)))
    with opened(snapshot, tmp_path) as pristine:
        pristine.accept(whole)
        await pristine.keep(whole)
        assert pristine.held_pages == PAGES
        for page in range(PAGES):
            pages = PageRange(page, 1)
            data = pristine.maybe_zero_page(pages) if is_zero(snapshot, page) else pristine.maybe_read_nowait(pages)
            assert data == snapshot.page(page)


def test_a_wrong_byte_anywhere_is_refused_and_its_page_named(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    whole = answer(snapshot, list(range(PAGES)))
    with opened(snapshot, tmp_path) as pristine:
        for at in full_runs(whole):
            with pytest.raises(VerificationError, match=f"page {whole.runs[at].pages.end - 1} "):
                pristine.accept(changed(whole, at))


def test_the_sum_decides_of_a_whole_leaf(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """Else nothing were gained: bytes that have it are not looked at page by page."""
    others = make_snapshot(tmp_path / "others", PAGES, seed=4, ram=_other_bytes(snapshot))
    assert others.digests != snapshot.digests
    theirs = replace(answer(others, list(range(PAGES))), leaves=answer(snapshot, list(range(PAGES))).leaves)
    with opened(snapshot, tmp_path / "cache", sums=others.sums) as pristine:
        pristine.accept(theirs)
    with opened(snapshot, tmp_path / "cache") as pristine, pytest.raises(VerificationError, match="page"):
        pristine.accept(theirs)


def _other_bytes(snapshot: BuiltSnapshot) -> bytes:
    """Zero pages where they were."""
    pages = [snapshot.page(page) for page in range(PAGES)]
    return b"".join(page if not any(page) else page[:-1] + bytes([page[-1] ^ 2 or 1]) for page in pages)


def test_right_bytes_in_another_place_are_refused(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """The sum is of bytes in a row: where a page belongs, the digests say."""
    borders = [page for page in range(LEAF_PAGES - 1) if not is_zero(snapshot, page) and is_zero(snapshot, page + 1)]
    whole = answer(snapshot, list(range(LEAF_PAGES)))
    run = next(at for at in full_runs(whole) if whole.runs[at].pages.end - 1 in borders)
    moved = whole.runs[run].pages
    found = list(whole.runs)
    found[run] = PageRun(PageRange(moved.start + 1, moved.count), whole.runs[run].data)
    found = [part for part in found if part.data is not None]  # nothing says that the pages around it came
    with opened(snapshot, tmp_path) as pristine, pytest.raises(VerificationError, match="page"):
        pristine.accept(replace(whole, runs=tuple(found)))


def test_runs_that_overlap_are_refused(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    whole = answer(snapshot, list(range(LEAF_PAGES)))
    first = full_runs(whole)[0]
    doubled = changed(whole, first).runs[first]
    with opened(snapshot, tmp_path) as pristine, pytest.raises(VerificationError, match="page"):
        pristine.accept(replace(whole, runs=(*whole.runs[: first + 1], doubled, *whole.runs[first + 1 :])))


@pytest.mark.parametrize("early", [1, 20, 120])
async def test_pages_that_came_before_the_rest(snapshot: BuiltSnapshot, tmp_path: Path, early: int) -> None:
    """A few are read back for the sum; of many, the rest is verified page by page."""
    full = [page for page in range(LEAF_PAGES) if not is_zero(snapshot, page)]
    first, rest = full[::2][:early], [page for page in range(LEAF_PAGES) if page not in full[::2][:early]]
    with opened(snapshot, tmp_path) as pristine:
        before, after = answer(snapshot, first), answer(snapshot, rest)
        pristine.accept(before)
        await pristine.keep(before)
        pristine.accept(after)
        with pytest.raises(VerificationError, match="page"):
            pristine.accept(changed(after, full_runs(after)[-1]))
        await pristine.keep(after)
        assert pristine.held_pages >= LEAF_PAGES


async def test_what_was_held_and_is_damaged_spoils_nothing_else(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """The rest is right, whatever became of the page in the cache's file; that is found when it is read."""
    full = [page for page in range(LEAF_PAGES) if not is_zero(snapshot, page)]
    before, after = answer(snapshot, full[:1]), answer(snapshot, full[1:])
    with opened(snapshot, tmp_path) as pristine:
        pristine.accept(before)
        await pristine.keep(before)
        await pristine.cache.pages.write(full[0] * PAGE_SIZE, b"damage")
        pristine.accept(after)
        assert pristine.maybe_read_nowait(PageRange(full[0], 1)) is None
        assert pristine.dropped_pages == 1


@pytest.mark.parametrize("spoil", ["bit", "short", "empty", "swapped"])
def test_other_sums_than_the_manifests_are_refused(snapshot: BuiltSnapshot, tmp_path: Path, spoil: str) -> None:
    sums = snapshot.sums
    bad = {
        "bit": bytes([sums[0] ^ 1]) + sums[1:],
        "short": sums[:-DIGEST_BYTES],
        "empty": b"",
        "swapped": sums[DIGEST_BYTES : 2 * DIGEST_BYTES] + sums[:DIGEST_BYTES] + sums[2 * DIGEST_BYTES :],
    }[spoil]
    with opened(snapshot, tmp_path) as pristine, pytest.raises(VerificationError, match="sums"):
        pristine.know_sums(bad, sums_digest(sums))
    with opened(snapshot, tmp_path) as pristine:
        pristine.accept(answer(snapshot, list(range(PAGES))))
