"""The files of an open state folder: written pages, their maps, the room reserved for more. See `statefolder`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import trio
from msgspec import Struct

from lazymem.errors import StoreError
from lazymem.pages import PageRange
from lazymem.store import folders, syncedmap
from lazymem.store.origin import RamOrigin
from lazymem.store.pagefile import PageFile
from lazymem.store.pagemap import SET, UNSET, PageMap
from lazymem.store.reserve import RESERVE_NAME, Reserve
from lazymem.store.syncedmap import SyncedMap
from lazymem.store.threads import in_thread_at_last

RAM_NAME = "pc.ram"
MAP_NAME = "written"
SYNCED_NAME = "synced"
META_NAME = "state.json"

LOST_KEY = "lost"
"""Of the record: the start of the host in which a sync failed. The kernel tells one daemon of it, and the next one has
to know. In another start of the host the folder has begun with what was synced."""

_LOOK_BYTES = 256 * 1024


class StateFolder(Struct):
    """An open, locked state folder. `private`: removed at close. `kept`: another process has a copy of the lock, and a
    next daemon goes on with the run, so it is left as it is. `notices`: what the user should read."""

    path: Path
    ram: PageFile
    written: PageMap
    lock_fd: int
    private: bool
    maybe_synced: SyncedMap | None = None
    reserve: Reserve | None = None
    notices: tuple[str, ...] = ()
    kept: bool = False

    async def store(self, pages: PageRange, offset: int, data: bytes) -> None:
        """`data`, which fills `pages`, into the file and then into the map, both in the kernel's hands on return. Runs
        to its end if cancelled. Nobody else may store these pages meanwhile.

        Raises:
            StoreError: the disk refused; bytes of pages that were written before may have changed.
        """
        unset = self.written.states(pages).count(UNSET)
        await self.ram.write(offset, data, partial(self.written.set_uncounted, pages, SET))
        self.written.count_in(unset)

    async def sync(self, limiter: trio.CapacityLimiter) -> None:
        """What was stored before the call reaches the disk, the map behind its pages. One call at a time. Waits for a
        thread where the host has none just now: that says nothing of the pages.

        Raises:
            StoreError: the disk refused.
        """
        if self.maybe_synced is None:
            await self.ram.sync()
            return
        if self.maybe_synced.has_lost:  # what no disk took note of then may be noted now
            await in_thread_at_last(limiter, self._note_lost)
        changes = await in_thread_at_last(limiter, self.maybe_synced.changes, self.written)
        try:
            await self.ram.sync()
        except StoreError:
            self.maybe_synced.pages_lost()
            await in_thread_at_last(limiter, self._note_lost)
            raise
        await in_thread_at_last(limiter, self.maybe_synced.apply, changes)

    def sync_now(self) -> None:
        """As `sync`, blocking, for a run that nobody serves any more."""
        if self.maybe_synced is None:
            return
        changes = self.maybe_synced.changes(self.written)
        try:
            os.fsync(self.ram.fileno())
        except OSError as error:
            self.maybe_synced.pages_lost()
            self._note_lost()
            raise StoreError(f"cannot sync {self.path / RAM_NAME}: {error.strerror}") from error
        self.maybe_synced.apply(changes)

    def note_whole(self) -> None:
        """Blocking: all is synced, and nothing follows. Where that cannot be noted the next mount says more than it
        must."""
        if self.maybe_synced is None or self.kept:
            return
        self._note({"whole": True})

    def _note_lost(self) -> None:
        lost = {LOST_KEY: syncedmap.boot_id()}
        record = folders.maybe_record(self.path / META_NAME) or {}
        if record.get(LOST_KEY) != lost[LOST_KEY]:
            self._note(lost)

    def _note(self, entries: Mapping[str, object]) -> None:
        record = folders.maybe_record(self.path / META_NAME)
        with contextlib.suppress(OSError):
            if record is not None:
                folders.write_record(self.path / META_NAME, {**record, **entries})

    def close(self) -> None:
        """Unsynced bytes stay in the kernel's hands and reach the disk later."""
        self.ram.close()
        self.written.close()
        if self.maybe_synced is not None:
            self.maybe_synced.close()
        if self.reserve is not None:
            self.reserve.close()
            if not self.kept:
                with contextlib.suppress(OSError):  # then the next mount takes it over
                    (self.path / RESERVE_NAME).unlink()
        if self.private and not self.kept:
            folders.remove_folder(self.path)
        if self.lock_fd >= 0:
            fd, self.lock_fd = self.lock_fd, -1
            if not self.kept:
                with contextlib.suppress(OSError):  # closing it does the same, where nobody has a copy
                    fcntl.flock(fd, fcntl.LOCK_UN)  # in every copy
            os.close(fd)


def open_files(path: Path, origin: RamOrigin, lock_fd: int, *, private: bool) -> StateFolder:
    """Open what is in `path`, and make what a mount killed in its first moments did not get to. Takes `lock_fd` over
    when it succeeds.

    Raises:
        StoreError: something in it is not what it was, or the disk refused.
    """
    ram, written = path / RAM_NAME, path / MAP_NAME
    try:
        _complete(written, origin.pages, needed=lambda: ram.exists() and ram.stat().st_blocks > 0)
        _complete(ram, origin.size_bytes, needed=lambda: has_bytes(written))
        if not private:
            _complete(path / SYNCED_NAME, origin.pages, needed=lambda: False)
    except OSError as error:
        raise StoreError(f"cannot make the files of the state folder {path}: {error.strerror}") from error
    with contextlib.ExitStack() as opened:
        ram_file = PageFile(folders.open_file(ram, origin.size_bytes), str(ram))
        opened.callback(ram_file.close)
        page_map = PageMap(folders.open_file(written, origin.pages), origin.pages)
        opened.callback(page_map.close)
        maybe_synced = None
        if not private:
            maybe_synced = SyncedMap(folders.open_file(path / SYNCED_NAME, origin.pages), origin.pages)
            if (folders.maybe_record(path / META_NAME) or {}).get(LOST_KEY) == syncedmap.boot_id():
                maybe_synced.pages_lost()
        opened.pop_all()
    return StateFolder(path, ram_file, page_map, lock_fd, private, maybe_synced)


def _complete(path: Path, size_bytes: int, *, needed: Callable[[], bool]) -> None:
    """Make a file that a mount killed in its first moments did not get to; one whose bytes are `needed` is not ours to
    make up."""
    if not path.exists():
        if needed():
            raise StoreError(f"{path} is gone, and with it what the guest wrote")
        folders.create_file(path, size_bytes)
    elif path.stat().st_size == 0:
        if needed():
            raise StoreError(f"{path} is empty, and what the guest wrote is gone")
        os.truncate(path, size_bytes)


def has_bytes(path: Path) -> bool:
    """Whether a page map says anything. One byte a page: what is not a hole is read, and compared with zeros."""
    nothing = bytes(_LOOK_BYTES)
    with open(path, "rb") as file:
        try:
            file.seek(0, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return False
            raise
        return any(chunk != nothing[: len(chunk)] for chunk in iter(lambda: file.read(_LOOK_BYTES), b""))
