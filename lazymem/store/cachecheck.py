"""A cache folder held against its own digests, page by page. Blocking, and reads only: mounts may be at work in it.

What is not held is not looked at. A mount verifies each page when it reads it, so a wrong one here does no harm; but it
says that a disk, or somebody, changes bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lazymem.digests import (
    DIGEST_BYTES,
    LEAF_PAGES,
    ZERO_PAGE_DIGEST,
    Checked,
    TreeShape,
    differing,
    leaf_matches,
    page_digests,
)
from lazymem.errors import StoreError
from lazymem.pages import PageRange, runs
from lazymem.store import cachefolder, folders
from lazymem.store.digestfile import NO_DIGEST, DigestFile
from lazymem.store.origin import RamOrigin
from lazymem.store.pagefile import pread_all
from lazymem.store.pagemap import SET, SET_ZERO, UNSET


class CheckableCache:
    """The cache of one snapshot, ``<cache>/<identity>``.

    Raises:
        StoreError: it is none, or not whole.
    """

    def __init__(self, folder: Path) -> None:
        record = folders.maybe_record(folder / cachefolder.META_NAME)
        try:
            self._origin = _origin(record)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{folder} is not the cache of a snapshot: its {cachefolder.META_NAME} is damaged"
            ) from error
        self.identity = self._origin.identity
        self.shape: TreeShape = self._origin.shape
        sizes = (self.shape.size_bytes, self.shape.pages, self.shape.file_bytes)
        names = (cachefolder.PAGES_NAME, cachefolder.MAP_NAME, cachefolder.DIGESTS_NAME)
        self._fds: list[int] = []
        try:
            for name, size in zip(names, sizes, strict=True):
                self._fds.append(_open(folder / name, size))
        except StoreError:
            self._close_fds()
            raise
        self._pages, self._map, digests = self._fds
        self._digests = DigestFile(os.dup(digests), self.shape)
        self._maybe_upper = None
        if self._origin.root is not None:
            self._maybe_upper = self._digests.maybe_upper(self._origin.root)

    @property
    def hashed(self) -> bool:
        return self._origin.root is not None

    def close(self) -> None:
        self._digests.close()
        self._close_fds()

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def held_pages(self) -> int:
        """So many are to be checked, as of now."""
        return sum(pages.count - states.count(UNSET) for pages, states in self._leaves())

    def check(self) -> Iterator[Checked]:
        """What is held, a MiB of RAM at a time; nothing where nothing is held.

        Raises:
            StoreError: the map is unreadable.
        """
        for leaf, states in self._leaves():
            held = [leaf.start + index for index, state in enumerate(states) if state != UNSET]
            for pages in runs(held):
                yield self._check(pages, states[pages.start - leaf.start : pages.end - leaf.start])

    def _leaves(self) -> Iterator[tuple[PageRange, bytes]]:
        for pages in PageRange(0, self.shape.pages).pieces(LEAF_PAGES):
            states = self._states(pages)
            if states.strip(b"\0"):
                yield pages, states

    def _states(self, pages: PageRange) -> bytes:
        try:
            return pread_all(self._map, pages.count, pages.start)
        except OSError as error:
            raise StoreError(f"cannot read the cache's page map: {error}") from error

    def _check(self, pages: PageRange, states: bytes) -> Checked:
        """Pages of one leaf, all of them held."""
        maybe_expected = self._maybe_digests(pages)
        if maybe_expected is None:
            return Checked(pages, unknown=tuple(range(pages.start, pages.end)))
        unreadable: list[int] = []
        found = b"".join(self._found(pages.start + index, state, unreadable) for index, state in enumerate(states))
        unknown = [
            pages.start + at // DIGEST_BYTES
            for at in range(0, len(found), DIGEST_BYTES)
            if maybe_expected[at : at + DIGEST_BYTES] == NO_DIGEST
        ]
        wrong = [
            page
            for page in differing(pages.start, found, maybe_expected)
            if page not in unreadable and page not in unknown and self._is_held(page)
        ]
        return Checked(pages, tuple(wrong), tuple(unreadable), tuple(unknown))

    def _found(self, page: int, state: int, unreadable: list[int]) -> bytes:
        if state == SET_ZERO:
            return ZERO_PAGE_DIGEST
        if state != SET:
            return NO_DIGEST
        here = PageRange(page, 1)
        try:
            return page_digests(pread_all(self._pages, here.length_bytes, here.offset_bytes))
        except OSError:
            unreadable.append(page)
            return NO_DIGEST

    def _is_held(self, page: int) -> bool:
        """Still: a mount that needs room gives pages up."""
        return self._states(PageRange(page, 1))[0] != UNSET

    def _maybe_digests(self, pages: PageRange) -> bytes | None:
        """16 bytes a page; None where they are not below the snapshot's root."""
        leaf = pages.start // LEAF_PAGES
        whole = PageRange(leaf * LEAF_PAGES, self.shape.leaf_pages(leaf))
        try:
            digests = self._digests.page_digests(whole)
        except StoreError:
            return None
        if self.hashed:
            if self._maybe_upper is None:
                return None
            if not leaf_matches(self._maybe_upper, leaf, digests):
                digests = ZERO_PAGE_DIGEST * whole.count  # a leaf of zeros is known by the upper level alone
                if not leaf_matches(self._maybe_upper, leaf, digests):
                    return None
        at = (pages.start - whole.start) * DIGEST_BYTES
        return digests[at : at + pages.count * DIGEST_BYTES]


def _open(path: Path, size_bytes: int) -> int:
    """For reading only, whoever's it is."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(f"cannot open {path}: {error.strerror}") from error
    try:
        found = os.fstat(fd).st_size
    except OSError as error:
        os.close(fd)
        raise StoreError(f"cannot look at {path}: {error.strerror}") from error
    if found != size_bytes:
        os.close(fd)
        raise StoreError(f"{path} has {found} bytes, not {size_bytes}: a mount begins this cache again")
    return fd


def caches_in(folder: Path) -> list[Path]:
    """`folder` itself if it is one snapshot's cache, else those in it, by name."""
    if (folder / cachefolder.META_NAME).exists():
        return [folder]
    try:
        return sorted(
            path.parent for path in folder.glob(f"*/{cachefolder.META_NAME}") if ".set-aside-" not in str(path)
        )
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error.strerror}") from error


def _origin(record: dict[str, object] | None) -> RamOrigin:
    if record is None or record["format"] != cachefolder.FORMAT or record["version"] != cachefolder.VERSION:
        raise ValueError("another format")
    root = record["root"]
    size = record["size_bytes"]
    if not isinstance(size, int):
        raise TypeError("size")
    return RamOrigin(bytes.fromhex(str(record["identity"])), size, None if root is None else bytes.fromhex(str(root)))
