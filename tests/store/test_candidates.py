"""Pages that came before the guest stood: whatever they are, only what has its digest is ever held."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, page_digest
from lazymem.errors import StoreError, VerificationError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, Fetched, PageRange, PageRun
from lazymem.store import candidatewriter
from lazymem.store.adoption import Adoption
from lazymem.store.cachefolder import open_cache
from lazymem.store.candidates import Candidates
from lazymem.store.candidatewriter import CandidateWriter, remove_candidates
from lazymem.store.digestfile import NO_DIGEST
from lazymem.store.origin import RamOrigin
from lazymem.store.pristine import PristinePages

PAGES = LEAF_PAGES + 40
"""Two leaves, the last one short."""

FROZEN = [ZERO_PAGE if page % 5 == 0 else bytes([page % 251 + 1, page % 7]) * (PAGE_SIZE // 2) for page in range(PAGES)]
OTHER = b"\x77" * PAGE_SIZE
DIGESTS = [page_digest(page) for page in FROZEN]


@dataclass
class Place:
    """A mount's store, and what a receiver writes beside it."""

    pristine: PristinePages
    candidates: Candidates
    adoption: Adoption
    writer: CandidateWriter

    def missing(self) -> set[int]:
        runs = self.pristine.missing_runs(PageRange(0, PAGES))
        return {page for run in runs for page in range(run.start, run.end)}

    async def read(self, page: int) -> bytes:
        """As a reader of the mount gets a page that is held."""
        maybe_data = self.pristine.maybe_read_held_nowait(PageRange(page, 1))
        if maybe_data is None:
            maybe_data, wrong = await self.pristine.read(PageRange(page, 1))
            assert not wrong
        return maybe_data


@asynccontextmanager
async def place(folder: Path) -> AsyncIterator[Place]:
    origin = RamOrigin(bytes(32), PAGES * PAGE_SIZE, None)
    writer = CandidateWriter(folder, "h", origin.size_bytes)
    candidates = Candidates(writer.folder, PAGES)
    writer.forget_name()
    assert not writer.folder.exists()
    pristine = PristinePages(origin, open_cache(folder, origin), maybe_candidates=candidates)
    try:
        yield Place(pristine, candidates, Adoption(pristine, candidates), writer)
    finally:
        writer.close()
        pristine.close()


def told(leaf: int, untold: AbstractSet[int] = frozenset()) -> bytes:
    pages = range(leaf * LEAF_PAGES, min((leaf + 1) * LEAF_PAGES, PAGES))
    return b"".join(NO_DIGEST if page in untold else DIGESTS[page] for page in pages)


class Kind:
    RIGHT, STALE, ZERO, OF_ANOTHER_PAGE = range(4)


def candidate(page: int, kind: int) -> bytes | None:
    """None: the source calls it zero."""
    if kind == Kind.ZERO:
        return None
    neighbour = FROZEN[(page + 1) % PAGES]
    return {Kind.RIGHT: FROZEN[page], Kind.STALE: OTHER, Kind.OF_ANOTHER_PAGE: neighbour}[kind]


@given(
    came=st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 3), max_size=60),
    later=st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 3), max_size=20),
    fetched=st.sets(st.integers(0, PAGES - 1), max_size=20),
    untold=st.sets(st.integers(0, PAGES - 1), max_size=20),
)
@settings(max_examples=30, deadline=None)
def test_only_what_has_its_digest_is_held(
    came: dict[int, int], later: dict[int, int], fetched: set[int], untold: set[int]
) -> None:
    """Whatever came, in whatever order, and whatever was fetched meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        trio.run(_held, Path(folder), came, later, fetched, untold)


async def _held(folder: Path, came: dict[int, int], later: dict[int, int], fetched: set[int], untold: set[int]) -> None:
    async with place(folder) as here:
        for kinds in (came, later):
            here.writer.write([PageRun(PageRange(page, 1), candidate(page, kind)) for page, kind in kinds.items()])
        assert here.candidates.decided_parts(PageRange(0, PAGES)) == []
        assert here.missing() == set(range(PAGES))
        assert here.pristine.next_to_guess(PageRange(0, PAGES), 1) is None
        await keep(here, fetched)
        leaves = await here.adoption.begin()
        expected = came | later
        assert leaves == sorted({page // LEAF_PAGES for page in expected})
        undecided = set(range(PAGES)) - {
            page for run in here.candidates.decided_parts(PageRange(0, PAGES)) for page in range(run.start, run.end)
        }
        assert undecided == set(expected)
        assert to_guess(here) == set(range(PAGES)) - fetched - undecided
        refused = [run for leaf in leaves for run in await here.adoption.adopt(leaf, told(leaf, untold))]

        right = {page for page, kind in expected.items() if (candidate(page, kind) or ZERO_PAGE) == FROZEN[page]}
        zeros = {page for page in range(PAGES) if page // LEAF_PAGES in leaves and FROZEN[page] == ZERO_PAGE}
        held = fetched | ((right | zeros) - untold)
        assert set(range(PAGES)) - here.missing() == held
        for page in held:
            assert await here.read(page) == FROZEN[page]
        assert {page for run in refused for page in range(run.start, run.end)} == set(expected) - held
        assert here.candidates.refused_pages == len(set(expected) - held)
        assert to_guess(here) == here.missing()
        assert here.candidates.decided_parts(PageRange(0, PAGES)) == [PageRange(0, PAGES)]


def to_guess(here: Place) -> set[int]:
    found: set[int] = set()
    start = 0
    while start < PAGES and (run := here.pristine.next_to_guess(PageRange(start, PAGES - start), 50)) is not None:
        found |= set(range(run.start, run.end))
        start = run.end
    return found


async def keep(here: Place, pages: set[int]) -> None:
    for page in sorted(pages):
        run = PageRun(PageRange(page, 1), FROZEN[page])
        fetched = Fetched((run,), {}, {page: DIGESTS[page]})
        here.pristine.accept(fetched)
        await here.pristine.keep(fetched)


async def test_what_was_vouched_for_stays(tmp_path: Path) -> None:
    """A source that tells a digest and later sends another page is not believed, nor the other way round."""
    async with place(tmp_path) as here:
        here.writer.write([PageRun(PageRange(1, 1), OTHER)])
        await here.adoption.begin()
        lie = told(0)[: 1 * DIGEST_BYTES] + page_digest(OTHER) + told(0)[2 * DIGEST_BYTES :]
        await here.adoption.adopt(0, lie)
        assert await here.read(1) == OTHER  # what this source vouches for is its guest's
        with pytest.raises(VerificationError):
            here.pristine.accept(Fetched((PageRun(PageRange(1, 1), FROZEN[1]),), {}, {1: DIGESTS[1]}))
        with pytest.raises(VerificationError):
            await here.adoption.adopt(0, told(0))
        assert await here.read(1) == OTHER
        with pytest.raises(VerificationError):
            here.pristine.accept(Fetched((PageRun(PageRange(2, 1), OTHER),), {}, {2: page_digest(OTHER)}))


@pytest.mark.parametrize("digests", [b"", b"x" * 15, bytes(DIGEST_BYTES * (PAGES + 1))])
async def test_digests_that_fit_nothing(digests: bytes, tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        here.writer.write([PageRun(PageRange(1, 1), FROZEN[1])])
        await here.adoption.begin()
        with pytest.raises(VerificationError):
            await here.adoption.adopt(0, digests)
        assert here.missing() == set(range(PAGES))


async def test_given_up_candidates_are_fetched(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        here.writer.write([PageRun(PageRange(0, PAGES), b"".join(FROZEN))])
        await here.adoption.begin()
        here.adoption.give_up(0)
        assert here.pristine.worth_fetching(PageRange(0, PAGES)) == [PageRange(0, LEAF_PAGES)]
        here.adoption.finish()
        assert here.pristine.worth_fetching(PageRange(0, PAGES)) == [PageRange(0, PAGES)]
        assert here.candidates.used_pages == 0
        assert here.missing() == set(range(PAGES))


async def test_what_is_decided_is_given_back_to_the_disk(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        here.writer.write([PageRun(PageRange(0, LEAF_PAGES), OTHER * LEAF_PAGES)])
        fd = here.candidates._fds[0]
        assert os.fstat(fd).st_blocks * 512 >= LEAF_PAGES * PAGE_SIZE
        await here.adoption.begin()
        await here.adoption.adopt(0, told(0))
        assert os.fstat(fd).st_blocks * 512 < PAGE_SIZE * 8
        assert here.candidates.refused_pages == sum(page != ZERO_PAGE for page in FROZEN[:LEAF_PAGES])


def test_a_page_beyond_the_ram_is_not_kept(tmp_path: Path) -> None:
    writer = CandidateWriter(tmp_path, "h", PAGES * PAGE_SIZE)
    with pytest.raises(StoreError, match="outside"):
        writer.write([PageRun(PageRange(PAGES - 1, 2), OTHER * 2)])
    size = (writer.folder / "pages").stat().st_size
    assert size == PAGES * PAGE_SIZE
    writer.close()
    assert not writer.folder.exists()


def test_a_disk_that_refuses_has_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CandidateWriter(tmp_path, "h", PAGES * PAGE_SIZE)
    fd = writer._fds[0]
    writer.write([PageRun(PageRange(0, 100), OTHER * 100)])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(candidatewriter, "pwrite_all", full)
    with pytest.raises(StoreError, match="cannot be kept"):
        writer.write([PageRun(PageRange(100, 1), OTHER)])
    assert os.fstat(fd).st_blocks == 0
    assert os.fstat(fd).st_size == PAGES * PAGE_SIZE
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(StoreError, match="cannot be kept"):
            writer.write([PageRun(PageRange(100, 1), OTHER)])
    monkeypatch.setattr(candidatewriter, "leave_room", full)
    with pytest.raises(StoreError, match="no more pages"):
        writer.write([PageRun(PageRange(100, 1), OTHER)])
    writer.close()


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        CandidateWriter(tmp_path / "file", "h", PAGES * PAGE_SIZE)
    assert os.listdir(tmp_path) == ["file"]


def test_only_such_a_folder_is_removed(tmp_path: Path) -> None:
    for name in ("other", ".candidates-1"):
        (tmp_path / name).mkdir()
        remove_candidates(tmp_path / name)
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("pages", [PAGES - 1, PAGES + 1])
def test_candidates_of_another_ram_are_not_opened(pages: int, tmp_path: Path) -> None:
    writer = CandidateWriter(tmp_path, "h", PAGES * PAGE_SIZE)
    with pytest.raises(StoreError):
        Candidates(writer.folder, pages)
    writer.close()
