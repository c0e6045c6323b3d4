"""A running guest's RAM file, published before it stands: nobody is answered until it does, then as an unhashed
snapshot whose bytes are vouched for as they are read.

Clients connect and ask meanwhile; their requests wait (`serves`). No pass over the file and no copy of it lies between
the guest's stop and the first answer.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import Path

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES
from lazymem.errors import RamFileError
from lazymem.pages import PageRange
from lazymem.residency import may_ask, runs_of_ones
from lazymem.snapshot.publishedfile import PublishedFile
from lazymem.snapshot.reader import SnapshotReader

UNTOLD = bytes(DIGEST_BYTES)
"""Of a page whose digest is not told."""


class Served(enum.IntEnum):
    """How much is answered."""

    NOTHING = 0
    DEMANDS = 1
    """What somebody waits for: the guest's device state still wants the link for itself."""
    ALL = 2


class LiveRam(SnapshotReader):
    """Opened by its path, with the identity that the hand-over gives it.

    Raises:
        RamFileError: it cannot be opened.
        SnapshotError: it is not of a size that RAM has.
    """

    def __init__(self, path: Path, identity: bytes) -> None:
        self._given_identity = identity
        self._served = Served.NOTHING
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RamFileError(f"cannot read the RAM file {path}: {error.strerror}") from error
        self._file = PublishedFile(descriptor)
        self._may_ask = may_ask(path)
        super().__init__(path.parent, self._file, None, b"", None, ram_alone=True)

    def _make_identity(self) -> bytes:
        return self._given_identity

    @property
    def vouches(self) -> bool:
        return self._may_ask

    def leaf_nowait(self, leaf: int) -> bytes | None:
        """Never: a megabyte may have to be read for it."""
        return None

    def leaf(self, leaf: int) -> bytes:
        """The page digests of a leaf that are vouched for from now on, `UNTOLD` for pages that are not in this host's
        memory: on a mount they would have to be fetched. One digest alone where all are the same.

        Raises:
            VerificationError: the file was changed.
            OSError: the disk failed.
        """
        pages = PageRange(leaf * LEAF_PAGES, self.shape.leaf_pages(leaf))
        found = b"".join([self._vouched_in(piece, is_data) for piece, is_data in self._file.segments(pages)])
        first = found[:DIGEST_BYTES]
        return first if found == first * pages.count else found

    def _vouched_in(self, pages: PageRange, is_data: bool) -> bytes:
        if not is_data:
            return self._read_segment(pages, False)[0].digests
        found = bytearray(UNTOLD * pages.count)
        for run in runs_of_ones(pages.start, self._file.resident(pages)):
            for vouched in self._read_segment(run, True):
                at = (vouched.pages.start - pages.start) * DIGEST_BYTES
                found[at : at + len(vouched.digests)] = vouched.digests
        return bytes(found)

    def freeze(self) -> list[int]:
        """The guest stands: what the file is now, it has to stay. Returns its stat signature."""
        self._signature = self._ram.signature()
        self._settled = False
        return list(self._signature)

    def is_as(self, signature: Sequence[int]) -> bool:
        """Whether the file is the one, and as it was, when `freeze` gave that signature."""
        # Without the device's number, which is another one after a mount.
        return list(self._ram.signature())[1:] == list(signature)[1:]

    def serve(self, how_much: Served) -> None:
        """From now on; the server is to be told to look again. Any thread may call it."""
        self._served = how_much

    def serves(self, *, background: bool) -> bool:
        return self._served >= (Served.ALL if background else Served.DEMANDS)
