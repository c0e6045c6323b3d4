"""Writes a snapshot folder: whole or absent.

Everything goes into a sibling folder with a name of its own; its files and the folder are synced and only then renamed
to the name that was asked for. A crash leaves at most that sibling, which no reader takes for a snapshot of that name,
and which the next one for the same name removes: it is locked for as long as somebody writes it.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from blake3 import blake3

from lazymem.digests import (
    LEAF_PAGES,
    ZERO_PAGE_DIGEST,
    TreeShape,
    leaf_digest,
    leaf_sum,
    page_digest,
    root_digest,
    sums_digest,
)
from lazymem.errors import BusyError, SnapshotError
from lazymem.pages import PAGE_SIZE, ZERO_PAGE
from lazymem.snapshot.manifest import DIGESTS_NAME, MANIFEST_NAME, RAM_NAME, SUMS_NAME, VMSTATE_NAME, Manifest, VmState
from lazymem.snapshot.ramcopy import data_extents

_LEAF_BYTES = LEAF_PAGES * PAGE_SIZE


class PendingSnapshot:
    """A snapshot that is being written; leaving the context before `publish` (or `keep`) removes it.

    Raises:
        SnapshotError: `target` exists, or its parent does not or may not be written.
    """

    def __init__(self, target: Path) -> None:
        self._target = Path(os.path.abspath(target))
        refuse_existing(self._target)
        self._token = secrets.token_hex(4)
        self.folder = self._sibling("partial")
        self._lock_fd = -1
        self._kept = False

    def __enter__(self) -> PendingSnapshot:
        draft = self._sibling("new")
        try:
            draft.mkdir()
            self._lock_fd = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            os.rename(draft, self.folder)  # only now, since what is called so and not locked is anybody's to remove
        except OSError as error:
            self._let_go()
            shutil.rmtree(draft, ignore_errors=True)
            raise SnapshotError(f"cannot write into {self.folder.parent}: {error.strerror}") from error
        _remove_abandoned(self._target, self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._let_go()

    def _sibling(self, state: str) -> Path:
        return self._target.parent / f".{self._target.name}.{state}-{self._token}"

    def _let_go(self) -> None:
        if self._lock_fd >= 0:
            fd, self._lock_fd = self._lock_fd, -1
            os.close(fd)

    @property
    def ram(self) -> Path:
        return self.folder / RAM_NAME

    @property
    def digests(self) -> Path:
        return self.folder / DIGESTS_NAME

    @property
    def sums(self) -> Path:
        return self.folder / SUMS_NAME

    @property
    def vmstate(self) -> Path:
        return self.folder / VMSTATE_NAME

    def can_move(self, ram: Path) -> bool:
        """Whether the RAM file could become the snapshot's by a rename: same file system, no second name."""
        status = ram.stat()
        return status.st_dev == self.folder.stat().st_dev and status.st_nlink == 1

    def move_ram(self, ram: Path) -> None:
        """Takes the RAM file itself; only once nothing maps it any more, and after `keep`."""
        os.rename(ram, self.ram)

    def seal(self, manifest: Manifest) -> None:
        """Writes the manifest and syncs all there is; only the name (and a RAM file to be moved) is left to do."""
        (self.folder / MANIFEST_NAME).write_bytes(manifest.to_json())
        for path in (*self.folder.iterdir(), self.folder):
            sync(path)

    def keep(self) -> None:
        """From here on the folder stays, come what may: it is about to hold a guest's only copy."""
        kept = self._sibling("kept")
        os.rename(self.folder, kept)  # a name that no later one takes for abandoned
        self.folder = kept
        self._kept = True

    def publish(self) -> None:
        """Gives the sealed folder its name.

        Raises:
            SnapshotError: somebody made something of that name meanwhile.
        """
        sync(self.folder)
        refuse_existing(self._target)
        try:
            os.rename(self.folder, self._target)
        except OSError as error:
            raise SnapshotError(f"cannot give the snapshot its name {self._target}: {error.strerror}") from error
        self._kept = True
        sync(self._target.parent)


def _remove_abandoned(target: Path, own: Path) -> None:
    """Half snapshots for this name, of processes that were killed; not our own."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.partial-????????"):
        if path == own:
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # no folder, or somebody was faster
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:  # somebody writes it
            continue
        finally:
            os.close(fd)


def refuse_existing(target: Path) -> None:
    """Raises SnapshotError when something of that name is there, a dangling link included."""
    if os.path.lexists(target):
        raise SnapshotError(f"{target} exists; a snapshot is only ever written to a new folder")
    if not target.parent.is_dir():
        raise SnapshotError(f"{target.parent} is not a folder, so no snapshot can be made in it")


def sync(path: Path) -> None:
    """fsync(2) of a file or a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


class Roots(NamedTuple):
    """What a manifest says of a RAM file's digest tree and of its leaf sums (both hex)."""

    tree: str
    sums: str


def write_digests(
    ram: Path,
    size_bytes: int,
    target: Path,
    advance: Callable[[int], None] = lambda _: None,
    maybe_sums: Path | None = None,
) -> Roots:
    """Writes the digest tree over the RAM file to `target`, and the leaf sums to `maybe_sums`. Holes are not read.

    `advance` gets `size_bytes` in all.

    Raises:
        BusyError: the file became shorter meanwhile.
    """
    shape = TreeShape(size_bytes)
    upper, found = bytearray(), bytearray()
    source = os.open(ram, os.O_RDONLY)
    try:
        with target.open("xb") as output:
            for leaf, has_data in enumerate(_leaves_with_data(source, shape)):
                pages = _pages(source, leaf, shape) if has_data else []
                digests = b"".join(map(_digest, pages)) or ZERO_PAGE_DIGEST * shape.leaf_pages(leaf)
                output.write(digests)
                upper += leaf_digest(digests)
                found += leaf_sum([b"".join(page for page in pages if page != ZERO_PAGE)])
                advance(shape.leaf_pages(leaf) * PAGE_SIZE)
            output.write(upper)
        if maybe_sums is not None:
            maybe_sums.write_bytes(found)
    finally:
        os.close(source)
    return Roots(root_digest(size_bytes, upper).hex(), sums_digest(found).hex())


def _leaves_with_data(source: int, shape: TreeShape) -> list[bool]:
    """For each leaf whether any of its 1 MiB is not a hole."""
    found = [False] * shape.leaves
    for start, end in data_extents(source, shape.size_bytes):
        for leaf in range(start // _LEAF_BYTES, -(-end // _LEAF_BYTES)):
            found[leaf] = True
    return found


def _pages(source: int, leaf: int, shape: TreeShape) -> list[bytes]:
    length = shape.leaf_pages(leaf) * PAGE_SIZE
    data = os.pread(source, length, leaf * _LEAF_BYTES)
    if len(data) != length:
        raise BusyError("the RAM file became shorter while its digests were made")
    # Slices of bytes, not of a view: those compare with one memcmp.
    return [data[at : at + PAGE_SIZE] for at in range(0, length, PAGE_SIZE)]


def _digest(page: bytes) -> bytes:
    return ZERO_PAGE_DIGEST if page == ZERO_PAGE else page_digest(page)


def vmstate_record(path: Path) -> VmState:
    """The manifest's record of a save stream that lies beside it."""
    hasher = blake3()
    hasher.update_mmap(path)
    return VmState(path.name, path.stat().st_size, hasher.hexdigest())


def new_ram_id() -> str:
    """A random name for one RAM (16 bytes, hex)."""
    return secrets.token_hex(16)


def create_like(target: Path, model: os.stat_result) -> int:
    """A new file that at most those may read who may read `model` (RAM holds secrets); returns its descriptor."""
    file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.fchmod(file, (model.st_mode & 0o666) | 0o600)
    return file
