"""RAM on a lazymem mount, as whoever saves its guest sees it: what was written, and what the rest is of."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from lazymem.digests import TreeShape
from lazymem.errors import IdentityError, RamFileError, SnapshotError
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot.layers import WholeDigests
from lazymem.snapshot.manifest import Manifest
from lazymem.snapshot.opening import maybe_manifest_in
from lazymem.snapshot.publishedfile import PublishedFile
from lazymem.snapshot.vouching import TreeVouching
from lazymem.vm.identity import MountRun

WRITTEN_NAME = ".pc.ram.written"
DIGESTS_NAME = ".pc.ram.digests"

_PIECE_BYTES = 8 << 20

_WHOLE = ctypes.c_int64(0)
_WRITE_AND_WAIT = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER (linux/fs.h); from 0 on, for 0 bytes: all of the file."""


class MountRam:
    """The RAM file `path` on a mount, open as `source` (which stays the caller's)."""

    def __init__(self, path: Path, size_bytes: int, run: MountRun, source: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.run = run
        self._source = source

    @property
    def pages(self) -> int:
        return self.size_bytes // PAGE_SIZE

    @property
    def tells_what_was_written(self) -> bool:
        """Not where just the file was bound to another place, nor with a daemon older than this."""
        return (self.path.parent / WRITTEN_NAME).exists()

    def manifest(self) -> Manifest:
        """Of the snapshot that is mounted.

        Raises:
            SnapshotError: nobody hashed it, so no page of it is known; or it is larger than the guest's RAM.
            IdentityError: it is not that of this mount.
        """
        found = maybe_manifest_in(self.path.parent)
        if found is None:
            raise SnapshotError(
                f"{self.path} is of a snapshot without digests, which cannot be a delta's parent: leave --delta out"
            )
        if found.identity.hex() != self.run.identity:
            raise IdentityError(f"{self.path} is RAM of another snapshot than the manifest beside it")
        if found.ram.size != self.size_bytes:
            raise SnapshotError(
                f"{self.path} has {found.ram.size} bytes, the guest's RAM {self.size_bytes}: leave --delta out"
            )
        return found

    def open_tree(self, manifest: Manifest) -> MountTree:
        """The digest tree of the snapshot that is mounted; what is not here is fetched when it is asked for.

        Raises:
            RamFileError: the mount does not have it.
            SnapshotError: it is not the manifest's.
        """
        path = self.path.parent / DIGESTS_NAME
        try:
            file = PublishedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise self.failed(error) from error
        shape = TreeShape(self.size_bytes)
        return MountTree(TreeVouching(WholeDigests(file, shape), path, shape, bytes.fromhex(manifest.ram_root)), self)

    def written(self) -> list[PageRange]:
        """The pages that the guest has written so far, in ascending runs; all of them where the mount does not tell.

        What is dirty in the kernel only is written out before. The guest has to stand, or the answer is old at once.

        Raises:
            RamFileError: the mount does not answer, or could not store what was written.
        """
        self.write_out()
        if not self.tells_what_was_written:
            return [PageRange(0, self.pages)]
        try:
            with open(self.path.parent / WRITTEN_NAME, "rb", buffering=0) as file:
                states = b"".join(iter(lambda: file.read(_PIECE_BYTES), b""))
        except OSError as error:
            raise self.failed(error) from error
        if len(states) < self.pages:
            raise RamFileError(f"the mount of {self.path} told of {len(states)} pages, and there are {self.pages}")
        return list(_set_runs(states[: self.pages]))  # a file may be longer than the RAM

    def write_out(self) -> None:
        """What is dirty in the kernel reaches the mount, which has it in a file then; no disk is waited for.

        Raises:
            RamFileError: the mount did not take it.
        """
        # Not fsync: the mount would sync its own file, and the guest stands meanwhile.
        if ctypes.CDLL(None, use_errno=True).sync_file_range(self._source, _WHOLE, _WHOLE, _WRITE_AND_WAIT):
            raise self.failed(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the RAM; missing pages are waited for.

        Raises:
            RamFileError: they do not come.
        """
        data = bytearray()
        while len(data) < length:  # a read ends before a page that does not come; the next one says why
            try:
                piece = os.pread(self._source, length - len(data), offset + len(data))
            except OSError as error:
                raise self.failed(error) from error
            if not piece:
                raise RamFileError(f"{self.path} ended at {offset + len(data)} bytes while it was read")
            if len(piece) == length:
                return piece
            data += piece
        return bytes(data)

    def failed(self, error: OSError) -> RamFileError:
        """What to say of a mount that refused something."""
        return RamFileError(f"cannot read {self.path} through its mount (whose log says why): {error.strerror}")


class MountTree:
    """The digest tree of the snapshot that is mounted, verified. `upper`: 16 bytes a leaf."""

    def __init__(self, tree: TreeVouching, ram: MountRam) -> None:
        """Takes `tree` over."""
        self._tree = tree
        self._ram = ram
        self.upper = tree.upper

    def leaf(self, leaf: int) -> bytes:
        """The page digests of a leaf; waits for the server where they are not here.

        Raises:
            RamFileError: they do not come.
            VerificationError: they are not the snapshot's.
        """
        try:
            return self._tree.leaf(leaf)
        except OSError as error:
            raise self._ram.failed(error) from error

    def close(self) -> None:
        self._tree.close()


def _set_runs(states: bytes) -> Iterator[PageRange]:
    """The runs of bytes that are not 0."""
    start = _first_set(states, 0)
    while start < len(states):
        end = states.find(0, start)
        end = len(states) if end < 0 else end
        yield PageRange(start, end - start)
        start = _first_set(states, end)


def _first_set(states: bytes, start: int) -> int:
    while start < len(states):
        piece = states[start : start + 65536]
        rest = piece.lstrip(b"\0")
        if rest:
            return start + len(piece) - len(rest)
        start += len(piece)
    return len(states)
