"""What a candidate comes to: held, once its digest is the one that the source vouches for, and else missing as before.

A page gets into the cache here as every other one does (`PristinePages.keep`), and by the same comparison of digests,
over the bytes that are then kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.pages import Fetched, PageRange, PageRun
from lazymem.store.candidates import Candidates
from lazymem.store.pristine import PristinePages

VERIFIED_A_TURN = 64
"""Pages that are hashed before others get a turn: a quarter of a millisecond."""


class Adoption:
    """Of the candidates that `pristine` was opened with."""

    def __init__(self, pristine: PristinePages, candidates: Candidates) -> None:
        self._pristine = pristine
        self._candidates = candidates

    async def begin(self) -> list[int]:
        """The guest stands, and no candidate comes any more. Returns the leaves that have some, in order.

        Raises:
            StoreError: the disk refused.
        """
        await self._candidates.begin()
        return self._candidates.leaves()

    async def adopt(self, leaf: int, digests: bytes) -> list[PageRange]:
        """The source vouches for `digests` (16 bytes a page of the leaf, zeros where it does not). Returns the runs of
        candidates that were wrong and are missing: what the guest wrote lately.

        Raises:
            VerificationError: it vouched for something else before.
            StoreError: the disk refused.
        """
        pristine, candidates = self._pristine, self._candidates
        first = leaf * LEAF_PAGES
        pristine.vouch(first, digests)
        missing = [(hole, full) for run, full in candidates.in_leaf(leaf) for hole in pristine.missing_runs(run)]
        read = await candidates.read([hole for hole, full in missing if full])
        right = [part for run in read for part in await self._verified(run)]
        if right:
            await pristine.keep(Fetched(tuple(right)))
        still = [hole for pages, _ in missing for hole in pristine.missing_runs(pages)]
        used, refused = _count(part.pages for part in right), _count(still)
        candidates.decided(leaf, used=used, refused=refused)
        if read:
            await candidates.give_back(PageRange(first, len(digests) // DIGEST_BYTES))
        return still

    async def _verified(self, run: PageRun) -> list[PageRun]:
        found: list[PageRun] = []
        for pages in run.pages.pieces(VERIFIED_A_TURN):
            assert run.data is not None, "a candidate has bytes"
            at = pages.offset_bytes - run.pages.offset_bytes
            found += self._pristine.right_parts(PageRun(pages, memoryview(run.data)[at : at + pages.length_bytes]))
            await trio.lowlevel.checkpoint()
        return found

    def give_up(self, leaf: int) -> None:
        """Of this leaf nothing will be known: its candidates are none."""
        self._candidates.decided(leaf, used=0, refused=_count(run for run, _ in self._candidates.in_leaf(leaf)))

    def finish(self) -> None:
        """No candidate is of any use any more."""
        self._candidates.finish()


def _count(runs: Iterable[PageRange]) -> int:
    return sum([run.count for run in runs])
