"""A snapshot's RAM and digest tree, opened: of one folder, or of a delta and its parent, which is looked for.

A parent is known by its identity alone: the folders that were named are looked at first, then those beside the delta.
Nothing is read of it that its size needs, but where its RAM file is newer than its manifest, or in memory, where a
mapped write moves no time: then somebody may have written to it, and all of it is read against its digests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lazymem.digests import LEAF_PAGES, ZERO_PAGE_DIGEST, TreeShape, page_digest
from lazymem.errors import SnapshotError, VerificationError
from lazymem.nowait import lies_in_memory
from lazymem.pages import PAGE_SIZE, PageRange
from lazymem.snapshot import deltaindex
from lazymem.snapshot.deltaindex import INDEX_NAME, DeltaIndex
from lazymem.snapshot.layers import DeltaDigests, DeltaRam, RamFile, WholeDigests, check_unchanged_leaves
from lazymem.snapshot.manifest import DIGESTS_NAME, MANIFEST_NAME, MAX_RAM_BYTES, Manifest
from lazymem.snapshot.opening import check_folder, maybe_manifest_in, open_regular
from lazymem.snapshot.publishedfile import PublishedFile
from lazymem.snapshot.vouching import TreeVouching

log = logging.getLogger(__name__)

MAX_DELTAS = 64
"""Over each other: each costs two descriptors, and two questions to the kernel a fault. Nobody needs so many."""


def open_ram(path: Path, maybe_size: int | None = None) -> PublishedFile:
    """A RAM file that is all of a RAM, of so many bytes (None: of any sane number).

    Raises:
        SnapshotError: it is not there, or of another size.
    """
    ram = PublishedFile(open_regular(path))
    size = ram.signature()[2]
    try:
        if maybe_size is not None and size != maybe_size:
            raise SnapshotError(f"{path} has {size} bytes, its manifest says {maybe_size}")
        if not 0 < size <= MAX_RAM_BYTES or size % PAGE_SIZE:
            raise SnapshotError(f"{path} has {size} bytes, which is not a multiple of {PAGE_SIZE} above 0")
    except SnapshotError:
        ram.close()
        raise
    return ram


def open_layers(
    folder: Path, manifest: Manifest, parents: Sequence[Path] = (), depth: int = 0
) -> tuple[RamFile, TreeVouching]:
    """The RAM that `manifest`, `folder`'s, is about, and its digest tree. Both are the caller's to close.

    Raises:
        SnapshotError: a file is missing or broken, or the parent is; one line that says which.
    """
    size = manifest.ram.size
    shape, root, digests = TreeShape(size), bytes.fromhex(manifest.ram_root), folder / DIGESTS_NAME
    if manifest.parent is not None:
        return _open_delta(folder, manifest, parents, depth)
    ram = open_ram(folder / manifest.ram.file, size)
    try:
        return ram, TreeVouching(WholeDigests(_open_digests(digests), shape), digests, shape, root)
    except BaseException:
        ram.close()
        raise


def _open_delta(folder: Path, manifest: Manifest, parents: Sequence[Path], depth: int) -> tuple[RamFile, TreeVouching]:
    if depth == MAX_DELTAS:
        raise SnapshotError(f"{folder} is behind {MAX_DELTAS} deltas that lie over each other: make a whole snapshot")
    index = _read_index(folder, manifest)
    size = manifest.ram.size
    shape, root, digests = TreeShape(size), bytes.fromhex(manifest.ram_root), folder / DIGESTS_NAME
    own = _open_own(folder / manifest.ram.file, index)
    try:
        base, base_tree = _open_parent(folder, manifest, parents, depth)
    except BaseException:
        own.close()
        raise
    ram = DeltaRam(own, index, base)
    try:
        try:
            file = DeltaDigests(_open_digests(digests), shape, index, base_tree)
        except BaseException:
            base_tree.close()
            raise
        tree = TreeVouching(file, digests, shape, root)
        try:
            check_unchanged_leaves(shape, index, tree.upper, base_tree.upper)
        except VerificationError as error:
            tree.close()
            raise SnapshotError(f"{folder} was not made from the parent that it names: {error}") from error
    except BaseException:
        ram.close()
        raise
    return ram, tree


def _open_digests(path: Path) -> PublishedFile:
    try:
        return PublishedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise SnapshotError(f"cannot open {path}, which manifest.json speaks of: {error.strerror}") from error


def _read_index(folder: Path, manifest: Manifest) -> DeltaIndex:
    total_pages = manifest.ram.size // PAGE_SIZE
    limit = deltaindex.max_file_bytes(total_pages)
    with os.fdopen(open_regular(folder / INDEX_NAME), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise SnapshotError(f"{folder / INDEX_NAME} has more bytes than any index of this RAM needs")
    try:
        return deltaindex.decode(data, manifest.identity, total_pages)
    except SnapshotError as error:
        raise SnapshotError(f"{folder}: {error}") from error


def _open_own(path: Path, index: DeltaIndex) -> PublishedFile:
    own = PublishedFile(open_regular(path))
    size = own.signature()[2]
    if size != index.pages * PAGE_SIZE:
        own.close()
        raise SnapshotError(f"{path} has {size} bytes, but its index names {index.pages} pages")
    return own


def _open_parent(folder: Path, manifest: Manifest, parents: Sequence[Path], depth: int) -> tuple[RamFile, TreeVouching]:
    """
    Raises:
        SnapshotError: it is nowhere, or not usable.
    """
    assert manifest.parent is not None
    problem: SnapshotError | None = None
    for candidate, found in _candidates(folder, bytes.fromhex(manifest.parent.identity), parents):
        try:
            return _open_as_parent(candidate, found, parents, depth)
        except SnapshotError as error:
            problem = problem or SnapshotError(f"the parent of {folder} cannot be used: {error}")
    if problem is not None:
        raise problem
    named = f", and not among {', '.join(map(str, parents))}" if parents else ""
    raise SnapshotError(
        f"the parent of {folder} (identity {manifest.parent.identity[:16]}...) is not beside it{named}: "
        "name its folder with --parent"
    )


def _open_as_parent(
    folder: Path, manifest: Manifest, parents: Sequence[Path], depth: int
) -> tuple[RamFile, TreeVouching]:
    ram, tree = open_layers(folder, manifest, parents, depth + 1)
    try:
        maybe_reason = _maybe_doubt(folder / manifest.ram.file, folder / MANIFEST_NAME)
        if maybe_reason is not None:
            log.warning("%s %s: reading all of it against its digests", folder, maybe_reason)
            check_all(ram, tree, manifest.ram.size // PAGE_SIZE)
    except (OSError, VerificationError) as error:
        ram.close()
        tree.close()
        raise SnapshotError(f"{folder} was changed since it was made: {error}") from error
    except BaseException:
        ram.close()
        tree.close()
        raise
    return ram, tree


def _candidates(folder: Path, identity: bytes, parents: Sequence[Path]) -> Iterator[tuple[Path, Manifest]]:
    """Folders that say that they are that snapshot, the named ones first."""
    for path in parents:
        check_folder(path)
        manifest = maybe_manifest_in(path)
        if manifest is None:
            raise SnapshotError(f"{path} cannot be a parent: it has no {MANIFEST_NAME}")
        if manifest.identity == identity:
            yield path, manifest
    own = Path(os.path.realpath(folder))
    for path in _folders_in(own.parent):
        if path == own:
            continue
        try:
            found = maybe_manifest_in(path)
        except SnapshotError:  # somebody else's, and none of our business
            continue
        if found is not None and found.identity == identity:
            yield path, found


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if os.path.isdir(path))
    except OSError:
        return []


def _maybe_doubt(ram: Path, manifest: Path) -> str | None:
    """Why the RAM file may not be as it was made; it was finished before its manifest was written."""
    found = ram.stat()
    if found.st_mtime_ns > manifest.stat().st_mtime_ns:
        return "is newer than its manifest"
    return "lies in memory, where a mapped write moves no time" if lies_in_memory(found.st_dev) else None


def check_all(ram: RamFile, tree: TreeVouching, total_pages: int) -> None:
    """All of a RAM against its digests; holes are not read.

    Raises:
        VerificationError: naming the page.
        OSError: the disk failed.
    """
    for part, is_data in ram.segments(PageRange(0, total_pages)):
        for piece in part.pieces(LEAF_PAGES):
            digests = _digests(ram.read(piece.offset_bytes, piece.length_bytes)) if is_data else b""
            refused = tree.first_refused(piece, digests or ZERO_PAGE_DIGEST * piece.count)
            if refused is not None:
                raise VerificationError(f"page {refused} is not what its digest says")


def _digests(data: bytearray) -> bytes:
    view = memoryview(data)
    return b"".join(page_digest(view[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE))
