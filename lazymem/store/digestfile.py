"""The cache's file of digests, laid out as `pc.ram.digests`: page digests in order, then the upper level.

Nothing in it is believed unseen: leaves are checked against the upper level, that against the root (`verify`). Sixteen
zero bytes stand for a digest that is not there; no page has that digest.
"""

from __future__ import annotations

import os

from lazymem.digests import DIGEST_BYTES, TreeShape, root_digest
from lazymem.errors import StoreError
from lazymem.pages import PageRange
from lazymem.store.pagefile import pread_all, pwrite_all

NO_DIGEST = bytes(DIGEST_BYTES)


class DigestFile:
    """The open file `fd` of ``shape.file_bytes`` bytes, taken over. All reads and writes are small."""

    def __init__(self, fd: int, shape: TreeShape) -> None:
        self._fd = fd
        self._shape = shape

    def page_digests(self, pages: PageRange) -> bytes:
        """16 bytes a page, `NO_DIGEST` where there is none.

        Raises:
            StoreError: the disk refused.
        """
        try:
            return pread_all(self._fd, pages.count * DIGEST_BYTES, pages.start * DIGEST_BYTES)
        except OSError as error:
            raise StoreError(f"cannot read the cache's digests: {error}") from error

    def store_page_digests(self, first_page: int, digests: bytes) -> None:
        """16 bytes a page from `first_page` on.

        Raises:
            StoreError: the disk refused.
        """
        self._write(first_page * DIGEST_BYTES, digests)

    def maybe_upper(self, root: bytes) -> bytes | None:
        """The upper level, if it is here and is the one under `root`."""
        try:
            upper = pread_all(self._fd, self._shape.upper_bytes, self._shape.upper_offset)
        except OSError:
            return None
        return upper if root_digest(self._shape.size_bytes, upper) == root else None

    def store_upper(self, upper: bytes) -> None:
        """Keep a verified upper level for the next mount.

        Raises:
            StoreError: the disk refused.
        """
        self._write(self._shape.upper_offset, upper)

    def _write(self, offset: int, data: bytes) -> None:
        try:
            pwrite_all(self._fd, data, offset)
        except OSError as error:
            raise StoreError(f"cannot write the cache's digests: {error}") from error

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
