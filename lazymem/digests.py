"""The digest tree over a RAM file: page digests, leaf digests, root. Pure.

- page digest: 16 bytes of BLAKE3 over one 4 KiB page;
- leaf: the page digests of 1 MiB (256 pages; the last one may be shorter), verified by its own 16-byte digest;
- upper level: the leaf digests one after the other (1 MiB for 64 GiB);
- root: 32 bytes over size, page size and the upper level. It stands in the manifest.

So one page is verified with one leaf (4 KiB), and mounting a huge image fetches the upper level only.

On disk (`pc.ram.digests`): all page digests in order, then the upper level.

Beside the tree, for who has a whole leaf of data at once: its sum, 16 bytes over the bytes of its pages that are not
zero. BLAKE3 takes a megabyte in a fifth of the time that it needs for the same bytes page by page. Which pages are zero
the page digests say. On disk (`pc.ram.sums`): 16 bytes a leaf, whose digest is in the manifest (and in its identity).

16 bytes hold against a second preimage (2**128 work); whoever can choose *both* contents could collide at 2**64, which
gives him nothing, since he made the snapshot.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache

from blake3 import blake3
from msgspec import Struct

from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, ZERO_PAGE, PageRange

DIGEST_BYTES = 16
LEAF_PAGES = 256
ROOT_BYTES = 32

_LEAF_CONTEXT = "lazymem 2026 digest tree leaf"
_ROOT_CONTEXT = "lazymem 2026 digest tree root"
_SUM_CONTEXT = "lazymem 2026 leaf sum"
_SUMS_CONTEXT = "lazymem 2026 leaf sums"


def page_digest(page: bytes | bytearray | memoryview) -> bytes:
    """16-byte digest of one page (4096 bytes)."""
    return blake3(page).digest(DIGEST_BYTES)


def page_digests(pages: bytes | bytearray | memoryview) -> bytes:
    """The digests of whole pages, one after the other."""
    view = memoryview(pages)
    return b"".join([blake3(view[at : at + PAGE_SIZE]).digest(DIGEST_BYTES) for at in range(0, len(view), PAGE_SIZE)])


ZERO_PAGE_DIGEST = page_digest(ZERO_PAGE)
_EACH = struct.Struct(f"{DIGEST_BYTES}s")
_ZERO = (ZERO_PAGE_DIGEST,)

_FEW_RUNS = 8
"""Of zero pages, in a leaf, as most have: each is found at memory's speed, for the price of ten single looks."""


@cache
def _zeros(count: int) -> bytes:
    return ZERO_PAGE_DIGEST * count


def zero_marks(digests: bytes | bytearray | memoryview) -> bytes:
    """One byte for each of these page digests: 1, it is a zero page's."""
    digests = bytes(digests)
    marks = bytearray(len(digests) // DIGEST_BYTES)
    found, runs = digests.find(ZERO_PAGE_DIGEST), 0
    while found >= 0:
        at, beyond = divmod(found, DIGEST_BYTES)
        runs += 1
        if beyond or runs > _FEW_RUNS:  # of two neighbours' bytes; or they lie here and there
            rest = _EACH.iter_unpack(memoryview(digests)[at * DIGEST_BYTES :])
            marks[at:] = bytes(map(_ZERO.__eq__, rest))  # a third of a comprehension's time
            break
        end = at + _zeros_ahead(digests, found)
        marks[at:end] = b"\1" * (end - at)
        found = digests.find(ZERO_PAGE_DIGEST, end * DIGEST_BYTES)
    return bytes(marks)


def _zeros_ahead(digests: bytes, start: int) -> int:
    """How many zero pages' digests follow one after the other from byte `start` on."""
    count, step = 0, 1
    while digests.startswith(_zeros(step), start + count * DIGEST_BYTES):
        count, step = count + step, step * 2
    while step > 1:
        step //= 2
        if digests.startswith(_zeros(step), start + count * DIGEST_BYTES):
            count += step
    return count


def leaf_digest(page_digests: bytes | bytearray | memoryview) -> bytes:
    """16-byte digest of a leaf, from its page digests one after the other (16 to 4096 bytes)."""
    return blake3(page_digests, derive_key_context=_LEAF_CONTEXT).digest(DIGEST_BYTES)


def root_digest(size_bytes: int, upper: bytes | bytearray | memoryview) -> bytes:
    """32-byte root over the RAM size and the upper level."""
    hasher = blake3(derive_key_context=_ROOT_CONTEXT)
    hasher.update(struct.pack("<QI", size_bytes, PAGE_SIZE))
    hasher.update(upper)
    return hasher.digest(ROOT_BYTES)


def leaf_sum(data: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """16-byte sum of a leaf, from the bytes of its pages that are not zero, in order, in pieces of any length."""
    hasher = blake3(derive_key_context=_SUM_CONTEXT)
    for piece in data:
        hasher.update(piece)
    return hasher.digest(DIGEST_BYTES)


def sums_digest(sums: bytes | bytearray | memoryview) -> bytes:
    """32-byte digest of all leaves' sums, one after the other."""
    return blake3(sums, derive_key_context=_SUMS_CONTEXT).digest(ROOT_BYTES)


class Checked(Struct, frozen=True):
    """A part of a RAM that somebody held against its digests, with page numbers: `wrong` have other bytes, `unreadable`
    the disk did not give, `unknown` have no digest that could be believed."""

    pages: PageRange
    wrong: tuple[int, ...] = ()
    unreadable: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()


def differing(first_page: int, left: bytes, right: bytes) -> tuple[int, ...]:
    """Pages from `first_page` on whose digests, 16 bytes a page in each, are not the same."""
    if left == right:
        return ()
    return tuple(
        first_page + at // DIGEST_BYTES
        for at in range(0, len(left), DIGEST_BYTES)
        if left[at : at + DIGEST_BYTES] != right[at : at + DIGEST_BYTES]
    )


class TreeShape(Struct, frozen=True):
    """How large the parts of the tree over `size_bytes` (a multiple of the page size) are."""

    size_bytes: int

    def __post_init__(self) -> None:
        if self.size_bytes <= 0 or self.size_bytes % PAGE_SIZE:
            raise ValueError(f"RAM size {self.size_bytes} is not a positive multiple of {PAGE_SIZE}")

    @property
    def pages(self) -> int:
        return self.size_bytes >> PAGE_SHIFT

    @property
    def leaves(self) -> int:
        return -(-self.pages // LEAF_PAGES)

    @property
    def upper_bytes(self) -> int:
        return self.leaves * DIGEST_BYTES

    @property
    def upper_offset(self) -> int:
        """Where the upper level starts in the digests file."""
        return self.pages * DIGEST_BYTES

    @property
    def file_bytes(self) -> int:
        return self.upper_offset + self.upper_bytes

    def leaf_pages(self, leaf: int) -> int:
        """Number of pages below leaf `leaf`."""
        return min(LEAF_PAGES, self.pages - leaf * LEAF_PAGES)


def leaf_matches(upper: bytes | memoryview, leaf: int, page_digests: bytes | memoryview) -> bool:
    """Whether `page_digests` are the leaf's, by the (already verified) upper level."""
    at = leaf * DIGEST_BYTES
    return leaf_digest(page_digests) == bytes(upper[at : at + DIGEST_BYTES])
