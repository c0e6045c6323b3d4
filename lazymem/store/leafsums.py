"""All pages of a leaf that come at once, verified by one sum over their bytes: a fifth of the time. See record 0025.

The sum is of the pages that are not zero, in order. It says nothing of where a page belongs: what is zero, and so where
the others are, the leaf's digests do, which were checked before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, TreeShape, leaf_sum, sums_digest, zero_marks
from lazymem.errors import VerificationError
from lazymem.pages import PageRange, PageRun

MAX_HELD_PAGES = 32
"""Of a leaf: so many that came before the others, for a fault or ahead of the rest, are read back for its sum. A few of
them cost as much as what the sum saves of one."""

_NOT_ZERO, _ZERO = 0, 1  # as `zero_marks` has it

ReadHeld = Callable[[PageRange], bytes | None]
"""The bytes of pages, not verified, if they are held and at hand."""

DigestsOfLeaf = Callable[[int], bytes | None]
"""A leaf's digests, which are the snapshot's, if they are here."""


class LeafSums:
    """`sums`: 16 bytes a leaf; `digest`: the manifest's, of all of them. `read_held`: asked for the few pages of a leaf
    that came before the others.

    Raises:
        VerificationError: they are not those that the manifest names.
    """

    def __init__(self, shape: TreeShape, sums: bytes, digest: bytes, read_held: ReadHeld) -> None:
        if len(sums) != shape.upper_bytes or sums_digest(sums) != digest:
            raise VerificationError("the leaves' sums are not those that the manifest names")
        self._sums = sums
        self._read_held = read_held

    def not_vouched_for(self, runs: Sequence[PageRun], digests_of_leaf: DigestsOfLeaf) -> Iterator[PageRun]:
        """Those of `runs` that the sums do not tell to be right: zeros, parts of leaves, and what is wrong."""
        for maybe_leaf, found in groupby(runs, _maybe_only_leaf):
            of_leaf = list(found)
            with_data = [run for run in of_leaf if run.data is not None]
            if maybe_leaf is None or not self._vouches(maybe_leaf, with_data, digests_of_leaf(maybe_leaf)):
                yield from of_leaf
            elif len(with_data) < len(of_leaf):
                yield from [run for run in of_leaf if run.data is None]

    def _vouches(self, leaf: int, runs: Sequence[PageRun], digests: bytes | None) -> bool:
        """Whether `runs`, with data, are right: with what is held they are all pages of the leaf that are not zero."""
        if digests is None or not runs:
            return False
        first = leaf * LEAF_PAGES
        marks = zero_marks(digests)
        pieces: list[bytes | memoryview] = []
        at = held = 0
        for run in runs:
            start, end = run.pages.start - first, run.pages.end - first
            if start < at or _ZERO in marks[start:end] or run.data is None:
                return False
            held += marks.count(_NOT_ZERO, at, start)
            if held > MAX_HELD_PAGES or not self._add_held(pieces, first, marks, at, start):
                return False
            pieces.append(run.data)
            at = end
        held += marks.count(_NOT_ZERO, at)
        if held > MAX_HELD_PAGES or not self._add_held(pieces, first, marks, at, len(marks)):
            return False
        return leaf_sum(pieces) == self._sums[leaf * DIGEST_BYTES : (leaf + 1) * DIGEST_BYTES]

    def _add_held(self, pieces: list[bytes | memoryview], first: int, marks: bytes, at: int, end: int) -> bool:
        """The bytes of the pages from ``first + at`` to ``first + end`` that are not zero; False: they are not here."""
        at = marks.find(_NOT_ZERO, at, end)
        while at >= 0:
            stop = marks.find(_ZERO, at, end)
            stop = end if stop < 0 else stop
            maybe_data = self._read_held(PageRange(first + at, stop - at))
            if maybe_data is None:
                return False
            pieces.append(maybe_data)
            at = marks.find(_NOT_ZERO, stop, end)
        return True


def _maybe_only_leaf(run: PageRun) -> int | None:
    """The leaf that all pages of `run` are in."""
    leaf = run.pages.start // LEAF_PAGES
    return leaf if run.pages.end <= (leaf + 1) * LEAF_PAGES else None
