"""How a guest's RAM file gets into its snapshot: what is done while it runs, while it stands, and when it runs again.

- `FileCopy`: an ordinary file, by a reflink or a copy.
- `MountCopy`: a file on a lazymem mount. All of it is read while the guest runs, which brings what is missing; then,
  while it stands, only what it wrote, once more. So a pause waits for no server.
- `MountDelta`: the same mount, but only what the guest wrote; the snapshot names the mounted one as its parent.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from lazymem.digests import TreeShape
from lazymem.pages import PageRange, is_zero
from lazymem.snapshot.delta import settle
from lazymem.snapshot.deltaindex import DeltaIndex
from lazymem.snapshot.manifest import DELTA_NAME, RAM_BLOCK, RAM_NAME, Block, Parent
from lazymem.snapshot.ramcopy import Copied, copy_ram, reflink, write_all
from lazymem.snapshot.writer import PendingSnapshot, create_like, write_digests
from lazymem.vm.emulator import RamBacking
from lazymem.vm.mountram import MountRam

_PIECE_BYTES = 1 << 20
_ZERO_CHECK_BYTES = 64 << 10
_LOOK_SECONDS = 0.2


class Reporter(Protocol):
    """Whoever wants to know how far it is: one phase after the other, each with a number of bytes or without."""

    def phase(self, text: str, total_bytes: int | None = None) -> None:
        """A new phase begins; the one before is over."""
        ...

    def advance(self, count_bytes: int) -> None:
        """So many bytes of the phase are done."""
        ...


class Made(Struct, frozen=True):
    """What a manifest has to say of the RAM. `index`, `parent`: of a delta, which has no `sums`."""

    block: Block
    root: str
    index: DeltaIndex | None = None
    parent: Parent | None = None
    sums: str | None = None


class RamWay(Protocol):
    """One way. The three are called in this order."""

    def warm_up(self) -> None:
        """While the guest still runs: what would otherwise have to wait for a disk or a network in its pause."""
        ...

    def copy(self) -> Copied:
        """While the guest stands."""
        ...

    def finish(self) -> Made:
        """Digests, when it may run again."""
        ...


class FileCopy:
    """From a file that is no mount's. `moving`: it will be renamed, so there is nothing to warm up."""

    def __init__(
        self, ram: RamBacking, source: int, pending: PendingSnapshot, reporter: Reporter, *, moving: bool
    ) -> None:
        self._ram = ram
        self._source = source
        self._pending = pending
        self._reporter = reporter
        self._moving = moving

    def warm_up(self) -> None:
        if self._moving:
            return
        # A reflink has to write out what is dirty first; this one does that for nearly all of it.
        trial = self._pending.folder / "trial"
        file = create_like(trial, os.fstat(self._source))
        try:
            reflink(self._source, file)
        finally:
            os.close(file)
            trial.unlink()

    def copy(self) -> Copied:
        self._reporter.phase("copying the RAM (the guest stands)", self._ram.size_bytes)
        target = create_like(self._pending.ram, os.fstat(self._source))
        try:
            return copy_ram(self._source, target, self._ram.size_bytes, self._reporter.advance)
        finally:
            os.close(target)

    def finish(self) -> Made:
        return hashed(self._pending.ram, self._ram.size_bytes, self._pending, self._reporter)


def hashed(ram: Path, size_bytes: int, pending: PendingSnapshot, reporter: Reporter) -> Made:
    """A RAM file that is whole, with its digests beside the others of `pending`."""
    reporter.phase("digests", size_bytes)
    roots = write_digests(ram, size_bytes, pending.digests, reporter.advance, pending.sums)
    return Made(Block(RAM_BLOCK, RAM_NAME, size_bytes), roots.tree, sums=roots.sums)


class MountCopy:
    """All of a mount's RAM, missing pages included."""

    def __init__(self, ram: MountRam, source: int, pending: PendingSnapshot, reporter: Reporter) -> None:
        self._ram = ram
        self._source = source
        self._pending = pending
        self._reporter = reporter

    def warm_up(self) -> None:
        self._reporter.phase("reading the RAM through its mount", self._ram.size_bytes)
        target = create_like(self._pending.ram, os.fstat(self._source))
        try:
            os.ftruncate(target, self._ram.size_bytes)
            _Copying(self._ram, self._source, target, self._reporter).run()
        finally:
            os.close(target)
        self._ram.write_out()

    def copy(self) -> Copied:
        runs = self._ram.written()
        self._reporter.phase("copying what the guest wrote (it stands)", sum(run.length_bytes for run in runs))
        target = os.open(self._pending.ram, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for piece in _pieces(runs):
                # Zeros too: they may be where other bytes were when it was read before.
                write_all(target, self._ram.read(piece.offset_bytes, piece.length_bytes), piece.offset_bytes)
                self._reporter.advance(piece.length_bytes)
        finally:
            os.close(target)
        return Copied("copy", sum(run.length_bytes for run in runs))

    def finish(self) -> Made:
        return hashed(self._pending.ram, self._ram.size_bytes, self._pending, self._reporter)


class _Copying:
    """Reads a mount's RAM into a file from a thread: this one stays free for an interrupt while a server is away."""

    def __init__(self, ram: MountRam, source: int, target: int, reporter: Reporter) -> None:
        self._size = ram.size_bytes
        # Descriptors of its own: it may still wait for a page when the caller has closed his.
        self._source = os.dup(source)
        self._target = os.dup(target)
        self._ram = MountRam(ram.path, ram.size_bytes, ram.run, self._source)
        self._reporter = reporter
        self._done_bytes = 0
        self._stop = False
        self._failure: BaseException | None = None

    def run(self) -> None:
        thread = threading.Thread(target=self._copy, name="reading the mount", daemon=True)
        thread.start()
        told = 0
        try:
            while thread.is_alive():
                thread.join(_LOOK_SECONDS)
                done = self._done_bytes
                self._reporter.advance(done - told)
                told = done
        finally:
            self._stop = True
        if self._failure is not None:
            raise self._failure

    def _copy(self) -> None:
        try:
            for offset in range(0, self._size, _PIECE_BYTES):
                if self._stop:
                    return
                data = self._ram.read(offset, min(_PIECE_BYTES, self._size - offset))
                for at in range(0, len(data), _ZERO_CHECK_BYTES):
                    piece = data[at : at + _ZERO_CHECK_BYTES]
                    if not is_zero(piece):
                        write_all(self._target, piece, offset + at)
                self._done_bytes = offset + len(data)
        except BaseException as error:  # noqa: BLE001  # raised again by the thread that waits
            self._failure = error
        finally:
            os.close(self._source)
            os.close(self._target)


class MountDelta:
    """What the guest wrote on a mount.

    Raises:
        SnapshotError, RamFileError: the snapshot that is mounted has no digests, or the mount does not tell.
    """

    def __init__(
        self, ram: MountRam, source: int, pending: PendingSnapshot, reporter: Reporter, undo: ExitStack
    ) -> None:
        """What is open is closed by `undo`."""
        self._ram = ram
        self._pending = pending
        self._reporter = reporter
        self._parent = ram.manifest()
        self._tree = ram.open_tree(self._parent)
        undo.callback(self._tree.close)
        self._file = create_like(pending.folder / DELTA_NAME, os.fstat(source))
        undo.callback(os.close, self._file)
        self._runs: list[PageRange] = []

    def warm_up(self) -> None:
        self._reporter.phase("writing out what the guest wrote")
        self._ram.write_out()

    def copy(self) -> Copied:
        self._runs = self._ram.written()
        total = sum(run.length_bytes for run in self._runs)
        self._reporter.phase("copying what the guest wrote (it stands)", total)
        at = 0
        for piece in _pieces(self._runs):
            write_all(self._file, self._ram.read(piece.offset_bytes, piece.length_bytes), at)
            at += piece.length_bytes
            self._reporter.advance(piece.length_bytes)
        return Copied("delta", total)

    def finish(self) -> Made:
        self._reporter.phase("digests", sum(run.length_bytes for run in self._runs))
        shape = TreeShape(self._ram.size_bytes)
        index, root = settle(self._file, self._runs, self._tree, shape, self._pending.digests, self._reporter.advance)
        block = Block(RAM_BLOCK, DELTA_NAME, self._ram.size_bytes)
        return Made(block, root, index, Parent(self._parent.identity.hex()))


def _pieces(runs: list[PageRange]) -> list[PageRange]:
    return [piece for run in runs for piece in run.pieces(_PIECE_BYTES >> 12)]
