"""One run's written pages on disk: the guest's only copy of them. Locked by one mount, bound to one snapshot. Blocking.

    pc.ram      written pages at their places, sparse
    written     one byte a page
    state.json  format, version, the snapshot's identity and size; the first file that is made
    lock        flock of the mount that has it

Without a folder of the user's the run gets a private one, ``run-...`` below the cache, which goes at close; those of
killed mounts go when the next one opens.

Caveat: after a crash of the *host* (not of the daemon), only what was synced is sure; the map may be on the disk ahead
of pages that were not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from lazymem.errors import BusyError, IdentityError, StoreError
from lazymem.store import folders
from lazymem.store.origin import RamOrigin
from lazymem.store.pagefile import PageFile
from lazymem.store.pagemap import PageMap

FORMAT = "lazymem-state"
VERSION = 1

RAM_NAME = "pc.ram"
MAP_NAME = "written"
META_NAME = "state.json"
LOCK_NAME = "lock"
PRIVATE_PREFIX = "run-"

_PRIVATE_NAME = re.compile(re.escape(PRIVATE_PREFIX) + "[0-9a-f]{16}")
_OWN_NAMES = frozenset({RAM_NAME, MAP_NAME, META_NAME, LOCK_NAME})

_LOOK_BYTES = 256 * 1024

_POLL_SECONDS = 0.05
"""Between tries for the lock: a mount's end is noticed sooner than a person would."""


class StateFolder(Struct):
    """An open, locked state folder. `private`: removed at close. `kept`: another process has a copy of the lock, and a
    next daemon goes on with the run, so it is left as it is."""

    path: Path
    ram: PageFile
    written: PageMap
    lock_fd: int
    private: bool
    kept: bool = False

    def close(self) -> None:
        """Unsynced bytes stay in the kernel's hands and reach the disk later."""
        self.ram.close()
        self.written.close()
        if self.private and not self.kept:
            folders.remove_folder(self.path)
        if self.lock_fd >= 0:
            fd, self.lock_fd = self.lock_fd, -1
            if not self.kept:
                fcntl.flock(fd, fcntl.LOCK_UN)  # in every copy
            os.close(fd)


def open_state(path: Path, origin: RamOrigin, *, wait_seconds: float = 0.0) -> StateFolder:
    """Open the state folder `path`, made if missing; wait up to `wait_seconds` for an earlier mount to let it go.

    Raises:
        BusyError: another mount has it.
        IdentityError: it holds writes over another snapshot.
        StoreError: it is something else, damaged, or the disk refused. Nothing in it was changed.
    """
    folders.ensure_folder(path)
    try:
        _refuse_foreign(path)
    except OSError as error:
        raise StoreError(f"cannot look into the state folder {path}: {error.strerror}") from error
    lock_fd = _wait_for_lock(path, wait_seconds)
    try:
        _bind(path, origin, durable=True)
        return _open(path, origin, lock_fd, private=False)
    except BaseException:
        os.close(lock_fd)
        raise


def open_private_state(cache: Path, origin: RamOrigin) -> StateFolder:
    """A new folder below `cache` for a run that ends with its mount; also clears away what killed mounts left.

    Raises:
        StoreError: the disk refused.
    """
    folders.ensure_folder(cache)
    _remove_abandoned(cache)
    name = secrets.token_hex(8)
    draft = cache / f".new-{name}"
    folders.ensure_folder(draft)
    lock_fd = folders.maybe_lock(draft / LOCK_NAME)
    assert lock_fd is not None, "nobody else knows the name"
    path = cache / f"{PRIVATE_PREFIX}{name}"
    try:
        os.rename(draft, path)  # visible to the next clearing away only once it is locked
        _bind(path, origin, durable=False)  # nobody opens it again
        return _open(path, origin, lock_fd, private=True)
    except BaseException as error:
        folders.remove_folder(draft)
        folders.remove_folder(path)
        os.close(lock_fd)
        if isinstance(error, OSError):
            raise StoreError(f"cannot make a folder for written pages in {cache}: {error.strerror}") from error
        raise


def adopt_state(path: Path, origin: RamOrigin, lock_fd: int, *, private: bool) -> StateFolder:
    """Open the folder of a run that goes on: its daemon was killed, and its lock, `lock_fd`, never let go.

    Raises:
        IdentityError: it holds writes over another snapshot.
        StoreError: it is gone or damaged, or the disk refused. Nothing in it was changed.
    """
    if not (path / META_NAME).exists():
        raise StoreError(f"the state folder {path} is gone, and with it what the guest wrote")
    _bind(path, origin, durable=not private)
    return _open(path, origin, lock_fd, private=private)


def remove_private(path: Path) -> None:
    """Clear away the private folder of a run that ended while it had no daemon."""
    if _PRIVATE_NAME.fullmatch(path.name) and not folders.why_not_ours(path) and _only_ours_in(path):
        folders.remove_folder(path)


def _refuse_foreign(path: Path) -> None:
    """A folder with other things in it (a snapshot's, say) is refused before anything is put there."""
    reason = folders.why_not_ours(path)
    if reason:
        raise StoreError(f"{path} cannot be a state folder: {reason}")
    if (path / META_NAME).exists():
        return
    others = [name for name in os.listdir(path) if name != LOCK_NAME and not name.startswith(f".{META_NAME}.")]
    if others:
        raise StoreError(f"{path} is not a state folder: it holds {sorted(others)[0]}; name an empty or a new one")


def _wait_for_lock(path: Path, wait_seconds: float) -> int:
    give_up = time.monotonic() + wait_seconds
    while True:
        fd = folders.maybe_lock(path / LOCK_NAME)
        if fd is not None:
            return fd
        left = give_up - time.monotonic()
        if left <= 0:
            raise BusyError(f"the state folder {path} is in use by another mount: unmount that one, or name another")
        time.sleep(min(left, _POLL_SECONDS))


def _bind(path: Path, origin: RamOrigin, *, durable: bool) -> None:
    """Check the record, or write it into a folder that has none."""
    meta = path / META_NAME
    wanted = {
        "format": FORMAT,
        "version": VERSION,
        "identity": origin.identity.hex(),
        "size_bytes": origin.size_bytes,
    }
    if not meta.exists():
        try:
            folders.write_record(meta, wanted, durable=durable)
        except OSError as error:
            raise StoreError(f"cannot write {meta}: {error.strerror}") from error
        return
    record = folders.maybe_record(meta)
    if record is None or record.get("format") != FORMAT:
        raise StoreError(f"{meta} is damaged or not a state folder's")
    if record.get("version") != VERSION:
        raise StoreError(f"{meta} has version {record.get('version')!r}, this lazymem knows {VERSION}")
    if record != wanted:
        raise IdentityError(
            f"the state folder {path} belongs to another snapshot ({str(record.get('identity'))[:16]}...)"
            f" than the one mounted ({origin.identity.hex()[:16]}...): name another folder"
        )


def _open(path: Path, origin: RamOrigin, lock_fd: int, *, private: bool) -> StateFolder:
    ram, written = path / RAM_NAME, path / MAP_NAME
    try:
        _complete(written, origin.pages, needed=lambda: ram.exists() and ram.stat().st_blocks > 0)
        _complete(ram, origin.size_bytes, needed=lambda: _has_bytes(written))
    except OSError as error:
        raise StoreError(f"cannot make the files of the state folder {path}: {error.strerror}") from error
    with contextlib.ExitStack() as opened:
        ram_file = PageFile(folders.open_file(ram, origin.size_bytes), str(ram))
        opened.callback(ram_file.close)
        page_map = PageMap(folders.open_file(written, origin.pages), origin.pages)
        opened.pop_all()
    return StateFolder(path, ram_file, page_map, lock_fd, private)


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


def _has_bytes(path: Path) -> bool:
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


def _remove_abandoned(cache: Path) -> None:
    """Whoever names a folder of his as the cache keeps what he has in it, whatever that is called."""
    for path in cache.glob(f"{PRIVATE_PREFIX}*"):
        if not _PRIVATE_NAME.fullmatch(path.name) or folders.why_not_ours(path) or not _only_ours_in(path):
            continue
        lock_fd = folders.maybe_lock(path / LOCK_NAME)
        if lock_fd is not None:
            folders.remove_folder(path)
            os.close(lock_fd)


def _only_ours_in(path: Path) -> bool:
    try:
        return all(_is_own(name) for name in os.listdir(path))
    except FileNotFoundError:  # its own mount was faster
        return False


def _is_own(name: str) -> bool:
    return name in _OWN_NAMES or name.startswith(f".{META_NAME}.")
