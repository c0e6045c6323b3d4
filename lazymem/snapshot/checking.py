"""A snapshot folder held against its own digests: pages, digest tree, device state. Blocking, and reads only.

Where `chain.check_all` stops at the first wrong page, this goes on and names them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from lazymem.digests import LEAF_PAGES, ZERO_PAGE_DIGEST, Checked, TreeShape, differing, page_digests, sums_digest
from lazymem.errors import SnapshotError, VerificationError
from lazymem.pages import PageRange
from lazymem.snapshot.chain import open_layers
from lazymem.snapshot.layers import RamFile
from lazymem.snapshot.manifest import SUMS_NAME, Manifest, vmstate_digest
from lazymem.snapshot.opening import check_folder, maybe_manifest_in
from lazymem.snapshot.vouching import TreeVouching


class CheckableSnapshot:
    """The opened folder; a delta with its parent, found as a server finds it. `kind`: "snapshot" or "delta".

    Raises:
        SnapshotError: it is no snapshot, has no digests, or its parts do not fit together.
    """

    def __init__(self, folder: Path, parents: Sequence[Path] = ()) -> None:
        check_folder(folder)
        maybe_manifest = maybe_manifest_in(folder)
        if maybe_manifest is None:
            raise SnapshotError(f"{folder} has no manifest.json, so there are no digests to hold its pages against")
        self._folder = folder
        self._manifest: Manifest = maybe_manifest
        self.kind = "snapshot" if maybe_manifest.parent is None else "delta"
        self.identity = maybe_manifest.identity
        self.shape = TreeShape(maybe_manifest.ram.size)
        self._ram, self._tree = open_layers(folder, maybe_manifest, parents)

    def close(self) -> None:
        with ExitStack() as files:
            files.callback(self._ram.close)
            files.callback(self._tree.close)

    def problems(self) -> list[str]:
        """What is wrong beside the pages, a line each."""
        return [*self._sums_problems(), *self._vmstate_problems()]

    def _sums_problems(self) -> list[str]:
        expected = self._manifest.ram_sums
        if expected is None:
            return []
        path = self._folder / SUMS_NAME
        try:
            right = sums_digest(path.read_bytes()).hex() == expected
        except OSError as error:
            return [f"{path}: {error.strerror}"]
        return [] if right else [f"{path} has not the leaves' sums that manifest.json names"]

    def _vmstate_problems(self) -> list[str]:
        expected = self._manifest.vmstate
        if expected is None:
            return []
        path = self._folder / expected.file
        try:
            size = path.stat().st_size
            if size != expected.size:
                return [f"{path} has {size} bytes, its manifest says {expected.size}"]
            right = vmstate_digest(path.read_bytes()) == expected.digest
        except OSError as error:
            return [f"{path}: {error.strerror}"]
        if not right:
            return [f"{path} is not the device state that manifest.json names"]
        return []

    def check(self) -> Iterator[Checked]:
        """All of the RAM, piece by piece. What lies in a hole is not read."""
        for part, is_data in self._ram.segments(PageRange(0, self.shape.pages)):
            at = part.start
            while at < part.end:  # within one leaf each
                end = min(part.end, (at // LEAF_PAGES + 1) * LEAF_PAGES)
                yield _check(self._ram, self._tree, PageRange(at, end - at), is_data=is_data)
                at = end


def _check(ram: RamFile, tree: TreeVouching, pages: PageRange, *, is_data: bool) -> Checked:
    try:
        expected = tree.expected(pages)
    except (OSError, VerificationError):  # its leaf is not the one below the root
        return Checked(pages, unknown=tuple(range(pages.start, pages.end)))
    if not is_data:
        return Checked(pages, differing(pages.start, ZERO_PAGE_DIGEST * pages.count, expected))
    try:
        found = page_digests(ram.read(pages.offset_bytes, pages.length_bytes))
    except (OSError, VerificationError):
        if pages.count == 1:
            return Checked(pages, unreadable=(pages.start,))
        return _joined(pages, [_check(ram, tree, page, is_data=True) for page in pages.pieces(1)])
    return Checked(pages, differing(pages.start, found, expected))


def _joined(pages: PageRange, parts: Sequence[Checked]) -> Checked:
    return Checked(
        pages,
        tuple(page for part in parts for page in part.wrong),
        tuple(page for part in parts for page in part.unreadable),
        tuple(page for part in parts for page in part.unknown),
    )
