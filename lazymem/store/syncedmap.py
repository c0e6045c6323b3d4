"""Which written pages are on the disk for sure: a second map, which is never ahead of its pages. Blocking.

The kernel writes a state folder's files to the disk when it likes, and in any order. So after a crash of the *host*
the live map (`written`) may name pages of which the disk has nothing, or what was in their blocks before. This one is
changed only when the pages that it is to name are synced, and then synced itself. Its holes and a live map's are the
same: no page.
"""

from __future__ import annotations

import os
from pathlib import Path

from lazymem.errors import StoreError
from lazymem.pages import PageRange
from lazymem.store import folders
from lazymem.store.pagefile import pread_all, pwrite_all
from lazymem.store.pagemap import PageMap

CHUNK_PAGES = 64 * 1024

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SyncedMap:
    """The open file `fd` with a byte for each of `pages`, taken over, also when it fails. One caller at a time.

    Raises:
        StoreError: the disk has no room for it, which a sync on a full disk would need.
    """

    def __init__(self, fd: int, pages: int) -> None:
        self._fd = fd
        self._pages = pages
        self._failed = False
        try:
            os.posix_fallocate(fd, 0, pages)
        except OSError as error:
            os.close(fd)
            raise StoreError(f"no room for a page map of {pages} bytes: {error.strerror}") from error

    def changes(self, written: PageMap) -> list[tuple[int, bytes]]:
        """What `written` has and this has not, to be applied once the pages are synced.

        Raises:
            StoreError: the disk refused.
        """
        found = []
        for start in range(0, self._pages, CHUNK_PAGES):
            live = written.states(PageRange(start, min(CHUNK_PAGES, self._pages - start)))
            if live.strip(b"\0") and live != self._read(start, len(live)):
                found.append((start, live))
        return found

    def apply(self, changes: list[tuple[int, bytes]]) -> None:
        """The pages of `changes` are on the disk: from here on they are there also after a crash of the host.

        Raises:
            StoreError: the disk refused, or once lost something (`pages_lost`).
        """
        if self._failed:
            raise StoreError("the disk refused written pages before: what it has of them is not known any more")
        try:
            for start, states in changes:
                pwrite_all(self._fd, states, start)
            if changes:
                os.fsync(self._fd)
        except OSError as error:
            raise StoreError(f"cannot sync the map of written pages: {error}") from error

    @property
    def has_lost(self) -> bool:
        """Whether `pages_lost` was called."""
        return self._failed

    def pages_lost(self) -> None:
        """A sync of the pages failed. The kernel tells that once, and forgets which pages it was: nothing that was not
        synced before counts as synced from here on."""
        self._failed = True

    def _read(self, start: int, count: int) -> bytes:
        try:
            return pread_all(self._fd, count, start)
        except OSError as error:
            raise StoreError(f"cannot read the map of synced pages: {error}") from error

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def boot_id() -> str:
    """Names this start of the host: what the kernel had in memory is gone in the next one."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # no /proc: no folder is believed to be of this start, so what was synced counts
        return ""


def begin_with_synced(written: Path, synced: Path, pages: int) -> int:
    """After a crash of the host: the live map becomes the synced one. How many pages it named beyond that; they are
    noted in ``written.unsynced``, for who wants to look.

    Raises:
        StoreError: `synced` is not what it should be, or the disk refused.
    """
    if synced.exists() and not synced.stat().st_size:  # nothing was ever synced, not even its size
        os.truncate(synced, pages)
    fd = folders.open_file(synced, pages)
    try:
        kept = pread_all(fd, pages, 0)
        before = written.read_bytes() if written.exists() else b""
        if before == kept:
            return 0
        draft = written.with_name(f".{written.name}.new")
        draft.unlink(missing_ok=True)
        folders.create_file(draft, pages)
        _write_data(draft, kept)
        unsynced = _beyond(before, kept)
        if unsynced:
            os.rename(written, written.with_name(f"{written.name}.unsynced"))
        os.rename(draft, written)
        return unsynced
    except OSError as error:
        raise StoreError(f"cannot begin with what was synced in {written.parent}: {error}") from error
    finally:
        os.close(fd)


def _beyond(live: bytes, sure: bytes) -> int:
    """How many pages the one map names and the other does not."""
    count = 0
    for start in range(0, len(live), CHUNK_PAGES):
        ours, theirs = live[start : start + CHUNK_PAGES], sure[start : start + CHUNK_PAGES]
        if ours != theirs:
            count += sum(bool(page) and not known for page, known in zip(ours, theirs, strict=False))
    return count


def _write_data(path: Path, data: bytes) -> None:
    """Into a file that is one hole, and stays one where there is nothing."""
    with open(path, "r+b") as file:
        for start in range(0, len(data), CHUNK_PAGES):
            chunk = data[start : start + CHUNK_PAGES]
            if chunk.strip(b"\0"):
                pwrite_all(file.fileno(), chunk, start)
