"""A delta over its parent, as if both were one: the RAM file and the digests file that a reader reads.

Both ask the index which of the two has a page (or a leaf of digests), and nothing else: what is right is `vouching`'s
subject, and a parent may itself be a delta over its own parent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, TreeShape
from lazymem.errors import SnapshotError, VerificationError
from lazymem.pages import PAGE_SHIFT, PageRange
from lazymem.snapshot.deltaindex import DeltaIndex
from lazymem.snapshot.publishedfile import PublishedFile


class RamFile(Protocol):
    """All of a RAM, in one file or in several. Offsets and lengths in bytes. For any thread."""

    def signature(self) -> tuple[int, ...]:
        """What `stat` says: device, inode, size of the RAM, latest write, latest change, and more of the kind."""
        ...

    def read_nowait(self, offset: int, length: int) -> bytearray | None: ...

    def read_into_nowait(self, buffer: bytearray | memoryview, offset: int) -> bool: ...

    def read(self, offset: int, length: int) -> bytearray: ...

    def segments(self, pages: PageRange) -> Iterator[tuple[PageRange, bool]]: ...

    def close(self) -> None: ...


class Leaves(Protocol):
    """Where the page digests of a parent's leaves come from, verified."""

    def leaf(self, leaf: int) -> bytes: ...

    def maybe_leaf_nowait(self, leaf: int) -> bytes | None: ...

    def close(self) -> None: ...


class DeltaRam:
    """A `RamFile`: `own` holds the pages that `index` names, `base` the others. Takes both over."""

    def __init__(self, own: PublishedFile, index: DeltaIndex, base: RamFile) -> None:
        self._own = own
        self._index = index
        self._base = base

    def signature(self) -> tuple[int, ...]:
        own, base = self._own.signature(), self._base.signature()
        return (own[0], own[1], base[2], max(own[3], base[3]), max(own[4], base[4]), *own, *base)

    def read_nowait(self, offset: int, length: int) -> bytearray | None:
        buffer = bytearray(length)
        return buffer if self.read_into_nowait(buffer, offset) else None

    def read_into_nowait(self, buffer: bytearray | memoryview, offset: int) -> bool:
        view = memoryview(buffer)
        for at, run, maybe_place in self._places(offset, len(buffer)):
            piece = view[at : at + run.length_bytes]
            if maybe_place is None:
                done = self._base.read_into_nowait(piece, run.offset_bytes)
            else:
                done = self._own.read_into_nowait(piece, maybe_place)
            if not done:
                return False
        return True

    def read(self, offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        for at, run, maybe_place in self._places(offset, length):
            if maybe_place is None:
                buffer[at : at + run.length_bytes] = self._base.read(run.offset_bytes, run.length_bytes)
            else:
                buffer[at : at + run.length_bytes] = self._own.read(maybe_place, run.length_bytes)
        return buffer

    def _places(self, offset: int, length: int) -> Iterator[tuple[int, PageRange, int | None]]:
        """Where in a buffer for these bytes (whole pages) each run goes, and where in `own` it is (None: in `base`)."""
        pages = PageRange(offset >> PAGE_SHIFT, length >> PAGE_SHIFT)
        for run, maybe_place in self._index.segments(pages):
            yield run.offset_bytes - offset, run, maybe_place

    def segments(self, pages: PageRange) -> Iterator[tuple[PageRange, bool]]:
        for run, maybe_place in self._index.segments(pages):
            if maybe_place is None:
                yield from self._base.segments(run)
            else:
                yield run, True

    def close(self) -> None:
        self._own.close()
        self._base.close()


class DigestsFile(Protocol):
    """The digest tree on disk, a leaf or the upper level at a time. For any thread."""

    def upper(self) -> bytes: ...

    def leaf(self, leaf: int) -> bytes: ...

    def maybe_leaf_nowait(self, leaf: int) -> bytes | None: ...

    def close(self) -> None: ...


class WholeDigests:
    """A `DigestsFile` with all page digests in order, then the upper level (`pc.ram.digests`). Takes `file` over."""

    def __init__(self, file: PublishedFile, shape: TreeShape) -> None:
        self._file = file
        self._shape = shape

    def upper(self) -> bytes:
        _check_size(self._file, self._shape.file_bytes)
        return bytes(self._file.read(self._shape.upper_offset, self._shape.upper_bytes))

    def leaf(self, leaf: int) -> bytes:
        return bytes(self._file.read(*self._place(leaf)))

    def maybe_leaf_nowait(self, leaf: int) -> bytes | None:
        data = self._file.read_nowait(*self._place(leaf))
        return None if data is None else bytes(data)

    def _place(self, leaf: int) -> tuple[int, int]:
        return leaf * LEAF_PAGES * DIGEST_BYTES, self._shape.leaf_pages(leaf) * DIGEST_BYTES

    def close(self) -> None:
        self._file.close()


class DeltaDigests:
    """A `DigestsFile` with the page digests of the leaves that `index` has a page of, then the upper level, whole.

    Those of other leaves are `base`'s. Takes both over.
    """

    def __init__(self, file: PublishedFile, shape: TreeShape, index: DeltaIndex, base: Leaves) -> None:
        self._file = file
        self._shape = shape
        self._base = base
        self._places: dict[int, int] = {}
        at = 0
        for leaf in index.leaves():
            self._places[leaf] = at
            at += shape.leaf_pages(leaf) * DIGEST_BYTES
        self._upper_at = at

    def upper(self) -> bytes:
        _check_size(self._file, self._upper_at + self._shape.upper_bytes)
        return bytes(self._file.read(self._upper_at, self._shape.upper_bytes))

    def leaf(self, leaf: int) -> bytes:
        place = self._places.get(leaf)
        if place is None:
            return self._base.leaf(leaf)
        return bytes(self._file.read(place, self._shape.leaf_pages(leaf) * DIGEST_BYTES))

    def maybe_leaf_nowait(self, leaf: int) -> bytes | None:
        place = self._places.get(leaf)
        if place is None:
            return self._base.maybe_leaf_nowait(leaf)
        data = self._file.read_nowait(place, self._shape.leaf_pages(leaf) * DIGEST_BYTES)
        return None if data is None else bytes(data)

    def close(self) -> None:
        self._file.close()
        self._base.close()


def _check_size(file: PublishedFile, size_bytes: int) -> None:
    found = file.signature()[2]
    if found != size_bytes:
        raise SnapshotError(f"it has {found} bytes, and those of this RAM have {size_bytes}")


def check_unchanged_leaves(shape: TreeShape, index: DeltaIndex, upper: bytes, base_upper: bytes) -> None:
    """Whether the leaves that a delta has no page of are its parent's.

    Raises:
        VerificationError: they are not: the delta was made of another parent.
    """
    own = set(index.leaves())
    for leaf in range(shape.leaves):
        at = leaf * DIGEST_BYTES
        if upper[at : at + DIGEST_BYTES] != base_upper[at : at + DIGEST_BYTES] and leaf not in own:
            raise VerificationError(f"leaf {leaf} of the digest tree, which the delta does not change, is another")
