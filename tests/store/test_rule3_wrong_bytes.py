"""Rule 3: wrong bytes are an error, never data: in answers, in leaves, in the upper level, in every cache file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.digests import DIGEST_BYTES, page_digest
from lazymem.errors import StoreError, VerificationError
from lazymem.pages import PAGE_SIZE, Fetched, PageRange, PageRun
from lazymem.store.cachefolder import DIGESTS_NAME, MAP_NAME, PAGES_NAME, open_cache
from lazymem.store.layers import DamageLayer
from lazymem.store.pristine import PristinePages
from tests.support.snapshots import BuiltSnapshot, make_snapshot
from tests.support.stores import opened_store, origin_of


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def one_bit(fetched: Fetched) -> Fetched:
    """In the last byte of the last run that has bytes."""
    wanted = max(index for index, run in enumerate(fetched.runs) if run.data is not None)
    runs = list(fetched.runs)
    data = bytes(runs[wanted].data or b"")
    runs[wanted] = PageRun(runs[wanted].pages, flip(data, len(data) - 1))
    return replace(fetched, runs=tuple(runs))


def put(path: Path, page: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, page * PAGE_SIZE)


def as_zeros(fetched: Fetched) -> Fetched:
    return replace(fetched, runs=tuple(PageRun(run.pages, None) for run in fetched.runs))


def short(fetched: Fetched) -> Fetched:
    return replace(
        fetched, runs=tuple(PageRun(run.pages, run.data[:-1] if run.data else run.data) for run in fetched.runs)
    )


def elsewhere(fetched: Fetched) -> Fetched:
    """The pages of one place with the bytes of another."""
    return replace(
        fetched, runs=tuple(PageRun(PageRange(run.pages.start + 1, run.pages.count), run.data) for run in fetched.runs)
    )


def bad_leaf(fetched: Fetched) -> Fetched:
    return replace(fetched, leaves={leaf: flip(bytes(digests), 5) for leaf, digests in fetched.leaves.items()})


def no_leaf(fetched: Fetched) -> Fetched:
    return replace(fetched, leaves={}, page_digests={})


def bad_vouching(fetched: Fetched) -> Fetched:
    return replace(fetched, page_digests={page: flip(bytes(d), 0) for page, d in fetched.page_digests.items()})


def outside(fetched: Fetched) -> Fetched:
    return replace(fetched, runs=(*fetched.runs, PageRun(PageRange(1 << 30, 1), None)))


LIES: dict[str, Callable[[Fetched], Fetched]] = {
    f.__name__: f for f in (one_bit, as_zeros, short, elsewhere, bad_leaf, no_leaf, bad_vouching, outside)
}


@pytest.mark.parametrize("name", LIES)
async def test_a_lying_answer_is_refused_whole(snapshot: BuiltSnapshot, tmp_path: Path, name: str) -> None:
    """Nothing of it is kept or learnt, the same page comes from an honest answer afterwards."""
    if name == ("bad_vouching" if snapshot.manifest else "bad_leaf"):
        return  # there is nothing of the kind in the answer
    lying = True
    full = next(page for page in range(snapshot.pages) if any(snapshot.page(page)) and any(snapshot.page(page + 1)))

    def maybe_lie(fetched: Fetched) -> Fetched:
        return LIES[name](fetched) if lying else fetched

    async with opened_store(snapshot, tmp_path / "cache", over=lambda source: DamageLayer(source, maybe_lie)) as store:
        with pytest.raises(VerificationError, match=r"page|leaf"):
            await store.ram.read(0, 40 * PAGE_SIZE)
        with pytest.raises(VerificationError):
            await store.ram.write(full * PAGE_SIZE + 100, b"part of a page whose rest is a lie")
        assert store.ram.held_pages == store.ram.written_pages == 0
        lying = False
        assert await store.ram.read(0, 40 * PAGE_SIZE) == snapshot.ram[: 40 * PAGE_SIZE]


async def test_the_wrong_page_is_named(hashed: BuiltSnapshot, tmp_path: Path) -> None:
    wrong = next(page for page in range(100, 120) if any(hashed.page(page)))

    def lie(fetched: Fetched) -> Fetched:
        return one_bit(fetched)

    async with opened_store(hashed, tmp_path / "cache", over=lambda source: DamageLayer(source, lie)) as store:
        with pytest.raises(VerificationError, match=f"page {wrong} "):
            await store.ram.read(wrong * PAGE_SIZE, 1)


async def test_an_unhashed_page_may_never_change(tmp_path: Path) -> None:
    """Changed at the source, with a digest to match: an error in this mount, and in the next one with the cache."""
    snapshot = make_snapshot(tmp_path / "snapshot", pages=16, seed=9, hashed=False)
    page = next(page for page in range(16) if any(snapshot.page(page)))
    for _ in range(2):
        async with opened_store(snapshot, tmp_path / "cache") as store:
            if store.ram.held_pages == 0:
                assert await store.ram.read(page * PAGE_SIZE, PAGE_SIZE) == snapshot.page(page)
                put(snapshot.folder / "pc.ram", page, flip(snapshot.page(page), 77))
            store.pristine.drop(PageRange(page, 1))
            with pytest.raises(VerificationError, match=f"page {page} .*changed"):
                await store.ram.read(page * PAGE_SIZE, PAGE_SIZE)
            store.cache.held.set(PageRange((page + 1) % 16, 1), 1)  # held, for the second round


@pytest.mark.parametrize("spoil", ["bit", "short", "long", "empty", "swapped"])
def test_a_wrong_upper_level_is_refused(hashed: BuiltSnapshot, tmp_path: Path, spoil: str) -> None:
    upper = hashed.upper
    swapped = upper[DIGEST_BYTES : 2 * DIGEST_BYTES] + upper[:DIGEST_BYTES] + upper[2 * DIGEST_BYTES :]
    bad = {"bit": flip(upper, 1), "short": upper[:-1], "long": upper + b"x", "empty": b"", "swapped": swapped}[spoil]
    origin = origin_of(hashed)
    cache = open_cache(tmp_path / "cache", origin)
    with pytest.raises(VerificationError, match="upper level"):
        PristinePages(origin, cache, bad)
    assert origin.root
    assert cache.digests.maybe_upper(origin.root) is None, "a wrong one is not stored"
    PristinePages(origin, cache, upper)
    assert cache.digests.maybe_upper(origin.root) == upper
    cache.close()


def fill(path: Path, value: int) -> None:
    """Every byte of a cache file, in place."""
    with open(path, "r+b") as file:
        file.write(bytes([value]) * path.stat().st_size)


@pytest.mark.parametrize("name", [PAGES_NAME, MAP_NAME, DIGESTS_NAME])
@pytest.mark.parametrize("value", [0, 1, 2, 255])
async def test_whatever_the_cache_holds_reads_are_right(
    hashed: BuiltSnapshot, tmp_path: Path, name: str, value: int
) -> None:
    """While it is open, and for the next mount."""
    async with opened_store(hashed, tmp_path / "cache") as store:
        assert await store.ram.read(0, len(hashed.ram)) == hashed.ram
        fill(store.cache.path / name, value)
        assert await store.ram.read(0, len(hashed.ram)) == hashed.ram
        fill(store.cache.path / name, value)
        if name == PAGES_NAME:
            assert store.ram.statistics().dropped_pages > 0
    async with opened_store(hashed, tmp_path / "cache") as store:
        assert await store.ram.read(0, len(hashed.ram)) == hashed.ram


async def test_one_bad_bit_costs_one_page(snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    async with opened_store(snapshot, tmp_path / "cache") as store:
        await store.ram.read(0, len(snapshot.ram))
        page = next(page for page in range(300, 600) if any(snapshot.page(page)))
        put(store.cache.path / PAGES_NAME, page, flip(snapshot.page(page), 4095))
        fetched = store.source.pages
        assert await store.ram.read(0, len(snapshot.ram)) == snapshot.ram
        assert store.source.pages == fetched + 1
        assert store.ram.statistics().dropped_pages == 1


async def test_lost_vouching_of_an_unhashed_snapshot_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk does not give the digests back that were noted: the guest gets its page all the same, verified against
    what the server says now, and from there on against that; and again once the disk is back."""
    bare = make_snapshot(tmp_path / "bare", pages=600, seed=3, hashed=False)
    async with opened_store(bare, tmp_path / "cache") as store:
        assert await store.ram.read(0, len(bare.ram)) == bare.ram
        with monkeypatch.context() as dying:

            def refuse(pages: PageRange) -> bytes:
                raise StoreError("injected: Input/output error")

            real = store.pristine.keep

            async def keep_or_not(fetched: Fetched) -> None:
                """As the scheduler, which tells no reader."""
                with contextlib.suppress(StoreError):
                    await real(fetched)

            dying.setattr(store.pristine, "keep", keep_or_not)
            dying.setattr(store.cache.digests, "page_digests", refuse)
            assert await store.ram.read(0, len(bare.ram)) == bare.ram
            with pytest.raises(VerificationError, match="not what its server first vouched for"):
                store.pristine.accept(_other_vouching(bare, page=5))
        assert await store.ram.read(0, len(bare.ram)) == bare.ram


def _other_vouching(snapshot: BuiltSnapshot, page: int) -> Fetched:
    data = flip(snapshot.page(page), 9)
    return Fetched((PageRun(PageRange(page, 1), data),), {}, {page: page_digest(data)})
