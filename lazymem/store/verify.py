"""Rule 3: which digest each page must have, and whether fetched or cached bytes have it. No disk but the digest file's.

Of a hashed snapshot: the upper level was checked against the manifest's root, a leaf is checked against the upper level
when it comes (from the source or from the cache's file), a page against its leaf, or all of a leaf's at once
(`leafsums`). Of a snapshot that nobody hashed: the digest that the server first vouched for, for ever.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Protocol

from lazymem.digests import (
    DIGEST_BYTES,
    LEAF_PAGES,
    ZERO_PAGE_DIGEST,
    TreeShape,
    leaf_digest,
    leaf_matches,
    page_digest,
    page_digests,
    root_digest,
    zero_marks,
)
from lazymem.errors import StoreError, VerificationError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE, Fetched, PageRange, PageRun
from lazymem.store.digestfile import NO_DIGEST, DigestFile
from lazymem.store.leafsums import LeafSums, ReadHeld

RECENT_LEAVES = 1024
"""4 MiB of checked leaves, for 1 GiB of RAM around the last touches; loading one again: a read and a hash of 4 KiB."""

_ZERO_LEAF = ZERO_PAGE_DIGEST * LEAF_PAGES


class Verifier(Protocol):
    """What differs between hashed and unhashed snapshots."""

    def missing_leaves(self, pages: PageRange) -> bool:
        """Whether leaf blocks must come with the next fetch of `pages`."""
        ...

    def digests_of(self, pages: PageRange) -> bytes:
        """16 bytes a page: the digest that it must have, `NO_DIGEST` where that is not known yet."""
        ...

    def maybe_digests(self, pages: PageRange) -> bytes | None:
        """As `digests_of`, if all are known and the pages lie in one leaf."""
        ...

    def accept(self, fetched: Fetched) -> None:
        """Check all of an answer and learn its digests.

        Raises:
            VerificationError: naming the page; nothing was learnt.
        """
        ...

    def store(self, fetched: Fetched) -> list[tuple[int, bytes]]:
        """Put what `accept` learnt from `fetched` into the digest file. Returns the leaves that were not there before:
        first page, and page digests.

        Raises:
            StoreError: the disk refused; it stays known in memory.
        """
        ...

    def zero_leaves(self) -> Iterator[PageRange]:
        """Pages of which the upper level alone says that they are zero, in order."""
        ...


def is_right(data: bytes, digests: bytes) -> bool:
    """Whether the pages in `data` have their digests (16 bytes a page). Of a zero page the digest is known."""
    pages = [data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE)]
    return b"".join([ZERO_PAGE_DIGEST if page == ZERO_PAGE else page_digest(page) for page in pages]) == digests


def wrong_pages(pages: PageRange, data: bytes | memoryview | None, digests: bytes) -> list[int]:
    """Pages whose bytes (None: all zero) do not have their digest (16 bytes a page in `digests`)."""
    found = ZERO_PAGE_DIGEST * pages.count if data is None else page_digests(data)
    if found == digests:
        return []
    return [
        pages.start + index
        for index in range(pages.count)
        if found[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        != digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
    ]


def zero_runs(first_page: int, digests: bytes) -> list[PageRange]:
    """The runs of pages that must be zero, by their digests."""
    if ZERO_PAGE_DIGEST not in digests:
        return []
    zero = zero_marks(digests)
    found: list[PageRange] = []
    start = zero.find(1)
    while start >= 0:
        end = zero.find(0, start)
        end = len(zero) if end < 0 else end
        found.append(PageRange(first_page + start, end - start))
        start = zero.find(1, end)
    return found


class HashedVerifier:
    """For a snapshot with a digest tree. `upper`: 16 bytes a leaf; checked here against `root`.

    Raises:
        VerificationError: the upper level is not the one under the root.
    """

    def __init__(self, shape: TreeShape, root: bytes, upper: bytes, file: DigestFile) -> None:
        if len(upper) != shape.upper_bytes or root_digest(shape.size_bytes, upper) != root:
            raise VerificationError("the upper level of the digest tree is not the one that the manifest names")
        self._shape = shape
        self._upper = upper
        self._zero = _zero_leaves(shape, upper)
        self._file = file
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        # Accepted but not yet in the file: may not be forgotten, or accepting their pages again would fail for ever.
        self._unstored: dict[int, bytes] = {}
        self._maybe_sums: LeafSums | None = None

    def know_sums(self, sums: bytes, digest: bytes, read_held: ReadHeld) -> None:
        """As `LeafSums`, for whole leaves from now on."""
        self._maybe_sums = LeafSums(self._shape, sums, digest, read_held)

    def missing_leaves(self, pages: PageRange) -> bool:
        if pages.count == 1:
            return self._maybe_leaf(pages.start // LEAF_PAGES) is None
        return any(self._maybe_leaf(leaf) is None for leaf in _leaves(pages))

    def digests_of(self, pages: PageRange) -> bytes:
        if pages.start % LEAF_PAGES + pages.count > LEAF_PAGES:
            return self._digests_of(pages, {})
        return self.maybe_digests(pages) or NO_DIGEST * pages.count

    def maybe_digests(self, pages: PageRange) -> bytes | None:
        start, count = pages.start, pages.count
        at = start % LEAF_PAGES
        digests = self._maybe_leaf(start // LEAF_PAGES)
        if digests is None or at + count > LEAF_PAGES or start + count > self._shape.pages:
            return None
        return bytes(digests[at * DIGEST_BYTES : (at + count) * DIGEST_BYTES])

    def accept(self, fetched: Fetched) -> None:
        if self._is_right_at_once(fetched):
            return
        for leaf, digests in fetched.leaves.items():
            if not 0 <= leaf < self._shape.leaves or not leaf_matches(self._upper, leaf, digests):
                raise VerificationError(f"the digests of leaf {leaf} are not the snapshot's")
        runs = list(_sound_runs(fetched, self._shape))
        if self._maybe_sums is not None:
            runs = list(
                self._maybe_sums.not_vouched_for(runs, lambda leaf: self._digests_of_leaf(leaf, fetched.leaves))
            )
        for run in runs:
            _check_run(run, self._digests_of(run.pages, fetched.leaves))
        for leaf, digests in fetched.leaves.items():
            if leaf not in self._recent:
                self._unstored[leaf] = bytes(digests)

    def _is_right_at_once(self, fetched: Fetched) -> bool:
        """Whether it is one page with data, under a leaf that is here, and right: what a fault brings."""
        if fetched.leaves or len(fetched.runs) != 1:
            return False
        pages, data = fetched.runs[0].pages, fetched.runs[0].data
        if pages.count != 1 or data is None or len(data) != PAGE_SIZE or pages.start >= self._shape.pages:
            return False
        digests = self._maybe_leaf(pages.start // LEAF_PAGES)
        at = pages.start % LEAF_PAGES * DIGEST_BYTES
        return digests is not None and page_digest(data) == digests[at : at + DIGEST_BYTES]

    def store(self, fetched: Fetched) -> list[tuple[int, bytes]]:
        leaves = set(fetched.leaves) | {leaf for run in fetched.runs for leaf in _leaves(run.pages)}
        stored: list[tuple[int, bytes]] = []
        for leaf in sorted(leaves & self._unstored.keys()):
            digests = self._unstored[leaf]
            self._file.store_page_digests(leaf * LEAF_PAGES, digests)
            self._unstored.pop(leaf, None)
            self._remember(leaf, digests)
            stored.append((leaf * LEAF_PAGES, digests))
        return stored

    def zero_leaves(self) -> Iterator[PageRange]:
        start = self._zero.find(1)
        while start >= 0:
            end = self._zero.find(0, start)
            end = len(self._zero) if end < 0 else end
            yield PageRange(start * LEAF_PAGES, min(end * LEAF_PAGES, self._shape.pages) - start * LEAF_PAGES)
            start = self._zero.find(1, end)

    def _digests_of(self, pages: PageRange, fresh: Mapping[int, bytes]) -> bytes:
        parts = []
        for leaf in _leaves(pages):
            first = leaf * LEAF_PAGES
            inside = PageRange(max(pages.start, first), min(pages.end, first + LEAF_PAGES) - max(pages.start, first))
            digests = self._digests_of_leaf(leaf, fresh)
            if digests is None:
                parts.append(NO_DIGEST * inside.count)
            else:
                at = (inside.start - first) * DIGEST_BYTES
                parts.append(bytes(digests[at : at + inside.count * DIGEST_BYTES]))
        return b"".join(parts)

    def _digests_of_leaf(self, leaf: int, fresh: Mapping[int, bytes]) -> bytes | None:
        return fresh[leaf] if leaf in fresh else self._maybe_leaf(leaf)

    def _maybe_leaf(self, leaf: int) -> bytes | None:
        if self._zero[leaf]:
            return _ZERO_LEAF
        digests = self._unstored.get(leaf)
        if digests is None:
            digests = self._recent.get(leaf)
            if digests is not None:
                self._recent.move_to_end(leaf)
        return digests if digests is not None else self._maybe_load(leaf)

    def _maybe_load(self, leaf: int) -> bytes | None:
        """From the file; another mount may have put it there meanwhile."""
        try:
            digests = self._file.page_digests(PageRange(leaf * LEAF_PAGES, self._shape.leaf_pages(leaf)))
        except StoreError:  # as good as not there: the source has it too
            return None
        if digests.startswith(NO_DIGEST) or not leaf_matches(self._upper, leaf, digests):
            return None
        self._remember(leaf, digests)
        return digests

    def _remember(self, leaf: int, digests: bytes) -> None:
        self._recent[leaf] = digests
        while len(self._recent) > RECENT_LEAVES:
            self._recent.popitem(last=False)


class UnhashedVerifier:
    """For a snapshot without digests: each page's first vouched digest is the one, whatever comes later. What the disk
    does not give back of them is forgotten; the server, which has them too, vouches for the same bytes for ever."""

    def __init__(self, shape: TreeShape, file: DigestFile) -> None:
        self._shape = shape
        self._file = file
        self._unstored: dict[int, bytes] = {}

    def missing_leaves(self, pages: PageRange) -> bool:
        return False

    def zero_leaves(self) -> Iterator[PageRange]:
        return iter(())

    def digests_of(self, pages: PageRange) -> bytes:
        try:
            return self._known(pages)
        except StoreError:  # as good as never fetched: the source has them, and vouches once more
            return self._in_memory(pages, NO_DIGEST * pages.count)

    def _known(self, pages: PageRange) -> bytes:
        """Raises StoreError."""
        return self._in_memory(pages, self._file.page_digests(pages))

    def _in_memory(self, pages: PageRange, stored: bytes) -> bytes:
        if not self._unstored:
            return stored
        return b"".join(
            self._unstored.get(page, stored[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
            for index, page in enumerate(range(pages.start, pages.end))
        )

    def maybe_digests(self, pages: PageRange) -> bytes | None:
        return None  # they come with the pages

    def accept(self, fetched: Fetched) -> None:
        vouched = dict(self._vouched(fetched))
        learnt: dict[int, bytes] = {}
        for run in _sound_runs(fetched, self._shape):
            known = self.digests_of(run.pages)
            expected = []
            for index, page in enumerate(range(run.pages.start, run.pages.end)):
                earlier = known[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
                digest = self._settle(page, earlier, vouched.get(page, ZERO_PAGE_DIGEST if run.data is None else None))
                expected.append(digest)
                if earlier == NO_DIGEST:
                    learnt[page] = digest
            _check_run(run, b"".join(expected))
        self._unstored.update(learnt)

    def vouch(self, first_page: int, digests: bytes) -> None:
        """The server vouches for pages without sending them: 16 bytes a page, `NO_DIGEST` where it does not.

        Raises:
            VerificationError: naming a page that it vouched for otherwise; nothing was learnt.
            StoreError: the disk refused; nothing was learnt.
        """
        count = len(digests) // DIGEST_BYTES
        if len(digests) % DIGEST_BYTES or not count or first_page + count > self._shape.pages:
            raise VerificationError(f"{len(digests)} bytes of digests from page {first_page} on")
        known = self.digests_of(PageRange(first_page, count))
        merged = []
        for index in range(count):
            earlier = known[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            now = digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            merged.append(earlier if now == NO_DIGEST else self._settle(first_page + index, earlier, now))
        self._file.store_page_digests(first_page, b"".join(merged))

    def _vouched(self, fetched: Fetched) -> Iterator[tuple[int, bytes]]:
        for start, digests in fetched.page_digests.items():
            if len(digests) % DIGEST_BYTES:
                raise VerificationError(f"digests from page {start} on have {len(digests)} bytes")
            for index in range(len(digests) // DIGEST_BYTES):
                yield start + index, bytes(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])

    def _settle(self, page: int, earlier: bytes, now: bytes | None) -> bytes:
        """The digest of `page`, from what was vouched for before and what is now (None: nothing)."""
        if earlier == NO_DIGEST:
            if now is None or now == NO_DIGEST:
                raise VerificationError(f"page {page} came without the digest that its server must vouch for")
            return now
        if now is not None and now != earlier:
            raise VerificationError(
                f"page {page} is not what its server first vouched for: the RAM file changed while it was served"
            )
        return earlier

    def store(self, fetched: Fetched) -> list[tuple[int, bytes]]:
        for run in fetched.runs:
            digests = self._known(run.pages)
            self._file.store_page_digests(run.pages.start, digests)
            for page in range(run.pages.start, run.pages.end):
                self._unstored.pop(page, None)
        return []


def _leaves(pages: PageRange) -> range:
    return range(pages.start // LEAF_PAGES, (pages.end - 1) // LEAF_PAGES + 1)


def _zero_leaves(shape: TreeShape, upper: bytes) -> bytes:
    """One byte a leaf: 1 where its digest is that of a leaf of zero pages. 64 GiB: 4 ms."""
    zero = leaf_digest(_ZERO_LEAF)
    found = bytearray(digest == zero for (digest,) in struct.iter_unpack(f"{DIGEST_BYTES}s", upper))
    last = shape.leaves - 1  # may be shorter
    found[last] = upper[last * DIGEST_BYTES :] == leaf_digest(ZERO_PAGE_DIGEST * shape.leaf_pages(last))
    return bytes(found)


def _sound_runs(fetched: Fetched, shape: TreeShape) -> Iterator[PageRun]:
    """The runs, each checked to lie inside the RAM and to have as many bytes as pages."""
    for run in fetched.runs:
        if run.pages.end > shape.pages:
            raise VerificationError(f"page {run.pages.end - 1} is outside a RAM of {shape.pages} pages")
        if run.data is not None and len(run.data) != run.pages.length_bytes:
            raise VerificationError(f"page {run.pages.start} and on: {len(run.data)} bytes for {run.pages.count} pages")
        yield run


def _check_run(run: PageRun, digests: bytes) -> None:
    wrong = wrong_pages(run.pages, run.data, digests)
    if wrong:
        at = (wrong[0] - run.pages.start) * DIGEST_BYTES
        lacking = digests[at : at + DIGEST_BYTES] == NO_DIGEST
        reason = "came without its leaf of digests" if lacking else "does not have the snapshot's bytes"
        raise VerificationError(f"page {wrong[0]} {reason}")
