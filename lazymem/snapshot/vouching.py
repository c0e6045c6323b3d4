"""Which digests a snapshot's pages have to have: from its digest tree, or fixed when a page is first read.

The reader asks one of these before it lets a page out. Both are bounded: the tree's leaves are cached up to a number,
and first-read digests take 16 bytes for each page that was read (sparse memory) and nothing for the rest.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, TreeShape, leaf_matches, root_digest
from lazymem.errors import SnapshotError, VerificationError
from lazymem.pages import PageRange
from lazymem.snapshot.layers import DigestsFile

MAX_CACHED_LEAVES = 4096
"""16 MiB of digests, for 4 GiB of RAM around which clients move; a leaf that fell out costs one read of 4 KiB."""

_UNKNOWN = bytes(DIGEST_BYTES)
"""No page has this digest but by a chance of 2**-128."""


class Vouching(Protocol):
    """What stands behind the pages of one RAM file."""

    def ready(self, pages: PageRange) -> bool:
        """Whether `first_refused` can answer without waiting for a disk. May raise what that raises."""
        ...

    def expected(self, pages: PageRange) -> bytes | None:
        """The digests that `pages` have to have, 16 bytes a page; None if not all are known yet. Call when `ready`."""
        ...

    def first_refused(self, pages: PageRange, digests: bytes) -> int | None:
        """The first of `pages` whose digest is not what it has to be; None if all may go out.

        Args:
            digests: 16 bytes a page, of the bytes just read.
        """
        ...

    def close(self) -> None: ...


class TreeVouching:
    """A hashed snapshot: the page digests stand in `pc.ram.digests` and hang together up to the manifest's root."""

    def __init__(self, file: DigestsFile, path: Path, shape: TreeShape, root: bytes) -> None:
        """Takes `file` over, also when it fails; `path` names it in errors. Reads and checks the upper level only
        (1 MiB for 64 GiB of RAM).

        Raises:
            SnapshotError: wrong size, or not the tree of the manifest.
        """
        self._shape = shape
        self._leaves: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._file = file
        try:
            self.upper = self._checked_upper(path, root)
        except BaseException:
            self._file.close()
            raise

    def _checked_upper(self, path: Path, root: bytes) -> bytes:
        try:
            upper = self._file.upper()
        except (OSError, SnapshotError, VerificationError) as error:
            raise SnapshotError(f"cannot read {path}: {error}") from error
        if root_digest(self._shape.size_bytes, upper) != root:
            raise SnapshotError(f"{path} is not the digest tree that manifest.json names")
        return upper

    def ready(self, pages: PageRange) -> bool:
        first, last = pages.start // LEAF_PAGES, (pages.end - 1) // LEAF_PAGES
        return all(leaf in self._leaves or self._load_nowait(leaf) for leaf in range(first, last + 1))

    def maybe_leaf_nowait(self, leaf: int) -> bytes | None:
        """The page digests below `leaf` if that needs no disk and they are right."""
        found = self._leaves.get(leaf)
        if found is None:
            with contextlib.suppress(OSError, VerificationError):  # `leaf` says why
                if self._load_nowait(leaf):
                    found = self._leaves.get(leaf)
        return found

    def leaf(self, leaf: int) -> bytes:
        """The page digests below `leaf`, verified; read from disk if need be. For any thread.

        Raises:
            VerificationError: the digests file was changed.
            OSError: the disk failed.
        """
        found = self._leaves.get(leaf)
        if found is not None:
            return found
        return self._keep(leaf, self._file.leaf(leaf))

    def _load_nowait(self, leaf: int) -> bool:
        """Have the leaf in memory if that needs no disk; whether it is there."""
        data = self._file.maybe_leaf_nowait(leaf)
        if data is None:
            return False
        self._keep(leaf, data)
        return True

    def _keep(self, leaf: int, found: bytes) -> bytes:
        if not leaf_matches(self.upper, leaf, found):
            raise VerificationError(f"leaf {leaf} of the digest tree was changed while the snapshot is served")
        with self._lock:
            self._leaves[leaf] = found  # the oldest goes first: a lookup, which is on every fault's path, moves nothing
            while len(self._leaves) > MAX_CACHED_LEAVES:
                self._leaves.popitem(last=False)
        return found

    def expected(self, pages: PageRange) -> bytes:
        first, last = pages.start // LEAF_PAGES, (pages.start + pages.count - 1) // LEAF_PAGES
        at = (pages.start - first * LEAF_PAGES) * DIGEST_BYTES
        found = self.leaf(first) if first == last else b"".join([self.leaf(leaf) for leaf in range(first, last + 1)])
        return found[at : at + pages.count * DIGEST_BYTES]

    def first_refused(self, pages: PageRange, digests: bytes) -> int | None:
        at = 0
        for leaf in range(pages.start // LEAF_PAGES, (pages.end - 1) // LEAF_PAGES + 1):
            first = max(pages.start, leaf * LEAF_PAGES)
            end = min(pages.end, (leaf + 1) * LEAF_PAGES)
            inside = first - leaf * LEAF_PAGES
            expected = self.leaf(leaf)[inside * DIGEST_BYTES : (inside + end - first) * DIGEST_BYTES]
            length = len(expected)
            if digests[at : at + length] != expected:
                return first + _first_difference(digests[at : at + length], expected)
            at += length
        return None

    def close(self) -> None:
        self._file.close()


class FirstReadVouching:
    """A RAM file that nobody hashed: what a page was when it was first read, it has to stay.

    Once the file's stat signature moved, pages that were never read cannot be told from changed ones and are refused.
    """

    def __init__(self, total_pages: int, unchanged: Callable[[], bool]) -> None:
        """Args:
        unchanged: whether the file's stat signature is still the one that it was published with.
        """
        self._unchanged = unchanged
        # A memory file is sparse whatever its size, where an anonymous map of a huge one would be refused.
        fd = os.memfd_create("lazymem-first-read", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, total_pages * DIGEST_BYTES)
            self._table = mmap.mmap(fd, total_pages * DIGEST_BYTES)
        finally:
            os.close(fd)
        self._lock = threading.Lock()

    def ready(self, pages: PageRange) -> bool:
        return True

    def expected(self, pages: PageRange) -> bytes | None:
        known = self._table[pages.start * DIGEST_BYTES : pages.end * DIGEST_BYTES]
        if _UNKNOWN in known:  # rare else: two digests side by side with as many zeros at the border
            return None
        return known

    def first_refused(self, pages: PageRange, digests: bytes) -> int | None:
        start, end = pages.start * DIGEST_BYTES, pages.end * DIGEST_BYTES
        if self._table[start:end] == digests:
            return None
        with self._lock:
            known = self._table[start:end]
            unchanged = self._unchanged()
            for index in range(pages.count):
                at = index * DIGEST_BYTES
                before = known[at : at + DIGEST_BYTES]
                if before != digests[at : at + DIGEST_BYTES] and (before != _UNKNOWN or not unchanged):
                    return pages.start + index
            self._table[start:end] = digests
        return None

    def close(self) -> None:
        self._table.close()


def zero_digests(count: int) -> bytes:
    """The digests of `count` zero pages."""
    return ZERO_PAGE_DIGEST * count


def _first_difference(left: bytes, right: bytes) -> int:
    """Index of the first digest that differs; there is one."""
    return next(
        at // DIGEST_BYTES
        for at in range(0, len(right), DIGEST_BYTES)
        if left[at : at + DIGEST_BYTES] != right[at : at + DIGEST_BYTES]
    )
