"""Makes a delta of pages that may have changed: those that did not are dropped.

The digest tree is the parent's with the others' digests in it; no page of the parent is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, TreeShape, leaf_digest, page_digest, root_digest
from lazymem.errors import BusyError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, PageRange, runs
from lazymem.snapshot.deltaindex import DeltaIndex
from lazymem.snapshot.ramcopy import Advance, write_all


class ParentTree(Protocol):
    """The parent's digests, verified: leaf digests (16 bytes each), and the page digests of one leaf."""

    upper: bytes

    def leaf(self, leaf: int) -> bytes: ...


def settle(
    file: int, held: Sequence[PageRange], parent: ParentTree, shape: TreeShape, digests: Path, advance: Advance
) -> tuple[DeltaIndex, str]:
    """Makes a delta's RAM file of the open `file`, which has the pages `held` (ascending) one after the other, and
    writes `digests` beside it. Returns which pages are left, and the root of the whole RAM's digest tree (hex).

    Raises:
        BusyError: the file became shorter meanwhile.
        VerificationError, OSError: the parent's digests cannot be had, or the disk refused.
    """
    upper = bytearray(parent.upper)
    kept: list[PageRange] = []
    read_at = write_at = 0
    with digests.open("xb") as output:
        for leaf, pieces in groupby(_by_leaf(held), lambda piece: piece.start // LEAF_PAGES):
            before = parent.leaf(leaf)
            after = bytearray(before)
            left: dict[int, bytes] = {}
            begin = read_at
            for piece in pieces:
                left |= _changed(piece, _read(file, piece.length_bytes, read_at), before, after)
                read_at += piece.length_bytes
            if left:
                if write_at != begin or len(left) * PAGE_SIZE != read_at - begin:
                    write_all(file, b"".join(left.values()), write_at)
                write_at += len(left) * PAGE_SIZE
                _add(kept, runs(left))
                output.write(after)
                upper[leaf * DIGEST_BYTES : (leaf + 1) * DIGEST_BYTES] = leaf_digest(after)
            advance(read_at - begin)
        output.write(upper)
    os.ftruncate(file, write_at)
    return DeltaIndex(shape.pages, kept), root_digest(shape.size_bytes, upper).hex()


def _by_leaf(held: Sequence[PageRange]) -> Iterator[PageRange]:
    for run in held:
        start = run.start
        while start < run.end:
            end = min(run.end, (start // LEAF_PAGES + 1) * LEAF_PAGES)
            yield PageRange(start, end - start)
            start = end


def _read(file: int, length: int, offset: int) -> bytes:
    data = os.pread(file, length, offset)
    if len(data) != length:
        raise BusyError("the RAM file became shorter while its digests were made")
    return data


def _changed(piece: PageRange, data: bytes, before: bytes, after: bytearray) -> dict[int, bytes]:
    """The pages of `data` that are not as before; their digests go into `after`. Both have a leaf's page digests."""
    found = {}
    for index in range(piece.count):
        page = data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
        digest = ZERO_PAGE_DIGEST if page == ZERO_PAGE else page_digest(page)
        at = (piece.start + index) % LEAF_PAGES * DIGEST_BYTES
        if before[at : at + DIGEST_BYTES] != digest:
            found[piece.start + index] = page
            after[at : at + DIGEST_BYTES] = digest
    return found


def _add(kept: list[PageRange], more: Sequence[PageRange]) -> None:
    for run in more:
        if kept and kept[-1].end == run.start:
            kept[-1] = PageRange(kept[-1].start, kept[-1].count + run.count)
        else:
            kept.append(run)
