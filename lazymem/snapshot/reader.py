"""A snapshot folder, opened for reading: RAM pages that were checked, digests, and the small files.

`open_snapshot` takes the time of a few small reads whatever the RAM's size. Files are opened once and stay open, so a
folder that is renamed or deleted meanwhile goes on being served.
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3
from msgspec import Struct

from lazymem.digests import DIGEST_BYTES, LEAF_PAGES, ZERO_PAGE_DIGEST, TreeShape, page_digest, zero_marks
from lazymem.errors import SnapshotError, VerificationError
from lazymem.nowait import lies_in_memory
from lazymem.pages import PAGE_SHIFT, PAGE_SIZE, ZERO_PAGE, PageRange, PageRun
from lazymem.snapshot import manifest as manifests
from lazymem.snapshot.chain import open_layers, open_ram
from lazymem.snapshot.layers import RamFile
from lazymem.snapshot.manifest import Manifest
from lazymem.snapshot.opening import check_folder, manifest_bytes, maybe_open_regular
from lazymem.snapshot.vouching import FirstReadVouching, TreeVouching, Vouching, zero_digests
from lazymem.snapshot.workingset import WORKING_SET_NAME

_LEAF_SHIFT = LEAF_PAGES.bit_length() - 1

SETTLED_NS = 1_000_000_000
"""A file whose last change is younger may change again without its signature moving: time stamps have a grain (10 ms
on a slow clock, more over a network)."""

LOOK_SECONDS = 0.001
"""So late a touched file may be noticed by who answers faults: whoever got a page verifies it, and asks again."""


class VouchedRun(Struct, frozen=True):
    """Pages that passed, all zero (`data` None) or none of them. `digests`: 16 bytes a page."""

    pages: PageRange
    data: memoryview | None
    digests: bytes


class SmallFile:
    """vmstate or working-set: opened once, its size fixed. `size_bytes` 0 stands for: there is none."""

    def __init__(self, path: Path, *, absent: bool = False) -> None:
        """`absent`: there is none, whatever lies at `path`."""
        self.path = path
        self._fd = None if absent else maybe_open_regular(path)
        self._published = self._signature()
        self.size_bytes = self._published[0]

    def _signature(self) -> tuple[int, int]:
        """Size and time of the last write. Not ctime: another link or name is no change."""
        if self._fd is None:
            return 0, 0
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end. May wait for a disk.

        Raises:
            VerificationError: the file was changed since it was opened; clients read it in pieces, which must fit.
            OSError: the disk failed.
        """
        length = max(0, min(length, self.size_bytes - offset))
        parts = []
        while length and self._fd is not None:
            part = os.pread(self._fd, length, offset)
            if not part:
                raise VerificationError(f"{self.path.name} was cut while the snapshot is served")
            parts.append(part)
            length -= len(part)
            offset += len(part)
        if self._signature() != self._published:
            raise VerificationError(f"{self.path.name} was changed while the snapshot is served")
        return b"".join(parts)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


class SnapshotReader:
    """Made by `open_snapshot`. Any thread may call any method."""

    def __init__(
        self,
        folder: Path,
        ram: RamFile,
        maybe_tree: TreeVouching | None,
        manifest_bytes: bytes,
        manifest: Manifest | None,
        *,
        ram_alone: bool = False,
    ) -> None:
        """Takes `ram` and `maybe_tree` (of a hashed snapshot) over, also when it fails.

        `ram_alone`: nothing else in `folder` belongs to it.
        """
        self.folder = folder
        self.manifest = manifest
        self.manifest_bytes = manifest_bytes
        self._ram = ram
        with ExitStack() as files:
            files.callback(ram.close)
            if maybe_tree is not None:
                files.callback(maybe_tree.close)
            self._signature = ram.signature()
            self._settled = False
            self._looked_at = -math.inf
            self._in_memory = any(lies_in_memory(device) for device in self._signature[::5])
            self.ram_bytes = self._signature[2]
            self.shape = TreeShape(self.ram_bytes)
            self._tree = maybe_tree
            self._vouching: Vouching
            if maybe_tree is not None:
                self._vouching = maybe_tree
            else:
                self._vouching = FirstReadVouching(self.total_pages, self.unchanged)
                files.callback(self._vouching.close)
            self.vmstate = SmallFile(folder / _vmstate_name(manifest), absent=ram_alone)
            files.callback(self.vmstate.close)
            self.working_set = SmallFile(folder / WORKING_SET_NAME, absent=ram_alone)
            files.callback(self.working_set.close)
            self.sums = SmallFile(folder / manifests.SUMS_NAME, absent=manifest is None or manifest.ram_sums is None)
            """The leaves' sums, if the manifest names some."""
            files.callback(self.sums.close)
            self._check_vmstate()
            self._check_sums()
            self._files = files.pop_all()
        self.identity = self._make_identity()

    def _make_identity(self) -> bytes:
        """An unhashed RAM file is like no other: not even the same file served by another process is known equal."""
        if self.manifest is not None:
            return self.manifest.identity
        return blake3(repr(self._signature).encode() + secrets.token_bytes(32)).digest(32)

    def _check_vmstate(self) -> None:
        expected = self.manifest.vmstate if self.manifest else None
        if expected is not None and expected.size != self.vmstate.size_bytes:
            raise SnapshotError(
                f"{self.vmstate.path} has {self.vmstate.size_bytes} bytes, its manifest says {expected.size}"
            )

    def _check_sums(self) -> None:
        expected = self.shape.upper_bytes  # 16 bytes a leaf, too
        if self.manifest is not None and self.manifest.ram_sums and self.sums.size_bytes != expected:
            raise SnapshotError(f"{self.sums.path} has {self.sums.size_bytes} bytes, its manifest says {expected}")

    @property
    def hashed(self) -> bool:
        return self.manifest is not None

    @property
    def vouches(self) -> bool:
        """Whether `leaf` tells what is vouched for of a snapshot that nobody hashed."""
        return False

    @property
    def total_pages(self) -> int:
        return self.ram_bytes >> PAGE_SHIFT

    def unchanged(self) -> bool:
        """Whether the RAM file's stat signature is still the one that it was opened with."""
        return self._ram.signature() == self._signature

    def serves(self, *, background: bool) -> bool:
        """Whether pages may be answered now, demanded or guessed ones; else requests wait. Asked once a step."""
        return True

    def untouched(self) -> bool:
        """Whether what was read before this call needs no digest to be believed: nobody wrote to the file.

        Whoever receives pages verifies them all the same. This is blind to a write through a shared map until the
        kernel moves the file's times, which it never does in memory: such files are never called untouched.
        """
        if self._in_memory or self._ram.signature() != self._signature:
            return False
        if not self._settled:  # ctime, since nobody can set it
            self._settled = time.time_ns() - self._signature[4] > SETTLED_NS
        return self._settled

    def _lately_untouched(self) -> bool:
        """As `untouched`, looked at not for each page: that is half of what the page itself costs."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return True
        if not self.untouched():
            return False
        self._looked_at = now
        return True

    # ---- pages

    def read_into_nowait(self, start: int, count: int, buffer: memoryview) -> bool | None:
        """A few pages of one leaf by the shortest way: True, they are in `buffer` (`count` pages); False, all are zero;
        None, ask `read_nowait` (which says why, and looks at the bytes if the file was touched). Hashed snapshots only.
        """
        leaf = self._tree.maybe_leaf_nowait(start >> _LEAF_SHIFT) if self._tree is not None else None
        if leaf is None:
            return None
        at = (start & (LEAF_PAGES - 1)) * DIGEST_BYTES
        digests = leaf[at : at + count * DIGEST_BYTES]
        zero = ZERO_PAGE_DIGEST in digests
        if zero and digests != ZERO_PAGE_DIGEST * count:
            return None
        try:
            if not zero and not self._ram.read_into_nowait(buffer, start << PAGE_SHIFT):
                return None
        except OSError:
            return None
        return (not zero) if self._lately_untouched() else None

    def read_nowait(self, pages: PageRange, *, suspect: bool = False) -> Sequence[VouchedRun] | None:
        """`pages` as runs if that needs no disk; else None (and nothing is lost).

        They are checked against their digests if the file was touched since it was opened, or if `suspect` (somebody
        found them wrong).

        Raises:
            VerificationError: a page is not what it was; the text names it.
            OSError: the disk failed.
        """
        if not self._vouching.ready(pages):
            return None
        if not suspect:
            expected = self._vouching.expected(pages)
            if expected is not None:
                runs = self._runs_nowait(pages, expected)
                if runs is None or self.untouched():
                    return runs
        data = self._ram.read_nowait(pages.offset_bytes, pages.length_bytes)
        return None if data is None else self._vouched(pages, data)

    def _runs_nowait(self, pages: PageRange, digests: bytes) -> list[VouchedRun] | None:
        """`pages` by what their digests say of them: zero ones are not even read. Not checked."""
        found: list[VouchedRun] = []
        borders = _borders(digests)
        for first, end in itertools.pairwise(borders):
            run = PageRange(pages.start + first, end - first)
            own = digests[first * DIGEST_BYTES : end * DIGEST_BYTES]
            data = None
            if not own.startswith(ZERO_PAGE_DIGEST):
                read = self._ram.read_nowait(run.offset_bytes, run.length_bytes)
                if read is None:
                    return None
                data = memoryview(read)
            found.append(VouchedRun(run, data, own))
        return found

    def read(self, pages: PageRange) -> list[VouchedRun]:
        """`pages` as runs, checked; holes are not read. May wait for a disk. Raises as `read_nowait`."""
        found: list[VouchedRun] = []
        for piece, is_data in self._ram.segments(pages):
            found.extend(self._read_segment(piece, is_data))
        return found

    def read_some(self, pages: PageRange, most_data_pages: int) -> list[VouchedRun]:
        """As `read`, but only the beginning of `pages`: the hole there, or up to `most_data_pages` of the data."""
        piece, is_data = next(self._ram.segments(pages))
        if is_data:
            piece = PageRange(piece.start, min(piece.count, most_data_pages))
        return self._read_segment(piece, is_data)

    def _read_segment(self, pages: PageRange, is_data: bool) -> list[VouchedRun]:
        if is_data:
            return self._vouched(pages, self._ram.read(pages.offset_bytes, pages.length_bytes))
        digests = zero_digests(pages.count)
        self._check(pages, digests)
        return [VouchedRun(pages, None, digests)]

    def read_pages(self, pages: PageRange) -> list[PageRun]:
        """`pages` as plain runs: what a local page source gives on. May wait for a disk. Raises as `read_nowait`."""
        return [PageRun(run.pages, run.data) for run in self.read(pages)]

    def _vouched(self, pages: PageRange, data: bytearray) -> list[VouchedRun]:
        view = memoryview(data)
        found: list[bytes] = []
        borders = [0]  # pages at which zero and other pages take turns
        was_zero = None
        for index in range(pages.count):
            at = index * PAGE_SIZE
            zero = data.startswith(ZERO_PAGE, at)
            found.append(ZERO_PAGE_DIGEST if zero else page_digest(view[at : at + PAGE_SIZE]))
            if zero is not was_zero:
                if index:
                    borders.append(index)
                was_zero = zero
        digests = b"".join(found)
        self._check(pages, digests)
        borders.append(pages.count)
        return [
            VouchedRun(
                PageRange(pages.start + first, end - first),
                None if found[first] is ZERO_PAGE_DIGEST else view[first * PAGE_SIZE : end * PAGE_SIZE],
                digests[first * DIGEST_BYTES : end * DIGEST_BYTES],
            )
            for first, end in itertools.pairwise(borders)
        ]

    def _check(self, pages: PageRange, digests: bytes) -> None:
        refused = self._vouching.first_refused(pages, digests)
        if refused is not None:
            raise VerificationError(f"page {refused} of {self.folder.name} is not what it was: the file was changed")

    # ---- digests

    def leaf_nowait(self, leaf: int) -> bytes | None:
        """The page digests below `leaf` if they are in memory. Hashed snapshots only."""
        ready = self._vouching.ready(PageRange(leaf * LEAF_PAGES, 1))
        return self.leaf(leaf) if ready else None

    def leaf(self, leaf: int) -> bytes:
        """The page digests below `leaf`. Hashed snapshots only. May wait for a disk.

        Raises:
            VerificationError: the digests file was changed.
        """
        return self._hashed_tree().leaf(leaf)

    def upper(self, first: int, count: int) -> bytes:
        """`count` leaf digests from leaf `first` on. Hashed snapshots only."""
        return self._hashed_tree().upper[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]

    def _hashed_tree(self) -> TreeVouching:
        if self._tree is None:
            raise SnapshotError(f"{self.folder.name} has no digest tree")
        return self._tree

    # ---- end

    def close(self) -> None:
        """Close all files. Nothing may be read afterwards."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_snapshot(path: str | os.PathLike[str], parents: Sequence[Path] = ()) -> SnapshotReader:
    """Open the snapshot folder `path`: with a manifest, or just `pc.ram` (and perhaps `vmstate`).

    A delta is opened as the whole snapshot that it makes of its parent, which is looked for among the folders
    `parents` and then beside it; `manifest_bytes` are the whole one's.

    Raises:
        SnapshotError: not a snapshot, or its parts do not fit together; one line that says which.
    """
    folder = Path(path)
    check_folder(folder)
    text = manifest_bytes(folder)
    if not text:
        return SnapshotReader(folder, open_ram(folder / manifests.RAM_NAME), None, text, None)
    manifest = manifests.parse(text)
    ram, tree = open_layers(folder, manifest, parents)
    if manifest.parent is not None:
        manifest = manifest.without_parent()
        text = manifest.to_json()
    return SnapshotReader(folder, ram, tree, text, manifest)


def _borders(digests: bytes) -> list[int]:
    """Pages at which zero and other pages take turns, from 0 to the number of pages."""
    count = len(digests) // DIGEST_BYTES
    if ZERO_PAGE_DIGEST not in digests or digests == ZERO_PAGE_DIGEST * count:
        return [0, count]
    marks = zero_marks(digests)
    found = [0]
    while (border := marks.find(not marks[found[-1]], found[-1])) >= 0:
        found.append(border)
    found.append(count)
    return found


def _vmstate_name(manifest: Manifest | None) -> str:
    return manifest.vmstate.file if manifest and manifest.vmstate else manifests.VMSTATE_NAME
