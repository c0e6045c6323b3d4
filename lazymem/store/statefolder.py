"""One run's written pages on disk: the guest's only copy of them. Locked by one mount, bound to one snapshot. Blocking.

    pc.ram      written pages at their places, sparse
    written     one byte a page: what the guest wrote
    synced      the same, of what surely is on the disk (`syncedmap`)
    state.json  format, version, the snapshot's identity and size; in which start of the host the folder was last
                opened, and whether it was closed whole; the first file that is made
    reserve     room on the disk for what the guest will write (`reserve`)
    lock        flock of the mount that has it

Without a folder of the user's the run gets a private one, ``run-...`` below the cache, which goes at close; those of
killed mounts go when the next one opens. It has no `synced`.

The death of a daemon loses nothing: files and maps are in the kernel's hands. After a crash of the *host*, which the
record tells, the folder is opened with the pages that were synced, each with its bytes of then or later ones.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

from lazymem.errors import BusyError, IdentityError, StoreError
from lazymem.nowait import is_in_memory
from lazymem.settings import DEFAULT_RESERVE_BYTES
from lazymem.store import folders, reserve, syncedmap
from lazymem.store.mendable import is_out_of_room
from lazymem.store.origin import RamOrigin
from lazymem.store.reserve import RESERVE_NAME
from lazymem.store.statefiles import (
    LOST_KEY,
    MAP_NAME,
    META_NAME,
    RAM_NAME,
    SYNCED_NAME,
    StateFolder,
    has_bytes,
    open_files,
)

FORMAT = "lazymem-state"
VERSION = 1

LOCK_NAME = "lock"
PRIVATE_PREFIX = "run-"

_PRIVATE_NAME = re.compile(re.escape(PRIVATE_PREFIX) + "[0-9a-f]{16}")
_OWN_NAMES = frozenset({RAM_NAME, MAP_NAME, META_NAME, LOCK_NAME, RESERVE_NAME})

_POLL_SECONDS = 0.05
"""Between tries for the lock: a mount's end is noticed sooner than a person would."""

log = logging.getLogger(__name__)


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
        record = _bind(path, origin)
        folders.make_private(path)
        notices = _after_crash(path, origin, record)
        if LOST_KEY in record and not _is_of_this_start(record):  # it begins with what was synced
            record = {key: value for key, value in record.items() if key != LOST_KEY}
            _note(path, record)
        state = open_files(path, origin, lock_fd, private=False)
        state.notices = notices
    except BaseException as error:
        os.close(lock_fd)
        if isinstance(error, OSError):
            raise StoreError(f"cannot look into the state folder {path}: {error.strerror}") from error
        raise
    try:
        # Durable before a page can be written: else a crash after that would not be seen.
        _note(path, {**record, "boot": syncedmap.boot_id(), "whole": False})
    except StoreError:
        state.close()
        raise
    return state


def _note(path: Path, record: dict[str, Any]) -> None:
    try:
        folders.write_record(path / META_NAME, record)
    except OSError as error:
        raise StoreError(f"cannot write {path / META_NAME}: {error.strerror}") from error


def _after_crash(path: Path, origin: RamOrigin, record: dict[str, Any]) -> tuple[str, ...]:
    """Begin with what was synced, unless the folder was last opened in this start of the host. What to tell the user.

    Raises:
        StoreError: nobody can say what is on the disk of what was written, or the disk refused.
    """
    written, synced = path / MAP_NAME, path / SYNCED_NAME
    if _is_of_this_start(record):
        return ()
    if not synced.exists() and "boot" not in record:
        if not (written.exists() and has_bytes(written)):
            return ()
        raise StoreError(
            f"{path} was last used by a lazymem that did not note what was synced, so pages may be lost since the host "
            f"last ended: if you know that it did not end since then, cp {written} {synced} believes them all"
        )
    unsynced = syncedmap.begin_with_synced(written, synced, origin.pages)
    if record.get("whole") or (not record.get("boot") and not unsynced):
        return ()
    when = "the host ended while" if record.get("boot") else "the host may have ended while"
    notice = (
        f"{when} {path} was in use: {unsynced} pages that were never synced are the snapshot's again, "
        "the others have their bytes of the last sync or later ones; go on with no guest's device state from before"
    )
    log.warning("%s", notice)
    return (notice,)


def _is_of_this_start(record: dict[str, Any]) -> bool:
    """Whether the folder was last opened in this start of the host, so all of its files are as they were left. False
    where the host does not say which it is."""
    return bool(record.get("boot")) and record["boot"] == syncedmap.boot_id()


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
        _bind(path, origin)
        return open_files(path, origin, lock_fd, private=True)
    except BaseException as error:
        folders.remove_folder(draft)
        folders.remove_folder(path)
        os.close(lock_fd)
        if isinstance(error, OSError):
            raise StoreError(f"cannot make a folder for written pages in {cache}: {error.strerror}") from error
        raise


def reserve_room(state: StateFolder, origin: RamOrigin, maybe_wanted_bytes: int | None) -> None:
    """Have room for so many bytes of written pages, those that are there counted in; None: the default, or what can be
    had without taking the disk's last bytes.

    Raises:
        StoreError: it cannot be had.
    """
    ram_fd = state.ram.fileno()
    if maybe_wanted_bytes is not None:
        if maybe_wanted_bytes:
            state.reserve = reserve.take(state.path, ram_fd, origin.size_bytes, maybe_wanted_bytes)
        return
    if is_in_memory(ram_fd):
        return
    try:
        wanted = reserve.modest(ram_fd, min(DEFAULT_RESERVE_BYTES, origin.size_bytes))
        if wanted < min(DEFAULT_RESERVE_BYTES, origin.size_bytes):
            state.notices += (
                f"little room is left on the disk of {state.path}: {wanted >> 20} MiB are reserved for what the guest "
                f"writes, not {DEFAULT_RESERVE_BYTES >> 20}; make room there, or say --reserve",
            )
        state.reserve = reserve.take(state.path, ram_fd, origin.size_bytes, wanted)
    except StoreError as error:
        log.log(logging.WARNING if is_out_of_room(error) else logging.INFO, "%s; going on without", error)


def adopt_state(path: Path, origin: RamOrigin, lock_fd: int, *, private: bool) -> StateFolder:
    """Open the folder of a run that goes on: its daemon was killed, and its lock, `lock_fd`, never let go.

    Raises:
        IdentityError: it holds writes over another snapshot.
        StoreError: it is gone or damaged, or the disk refused. Nothing in it was changed.
    """
    try:
        if not (path / META_NAME).exists():
            raise StoreError(f"the state folder {path} is gone, and with it what the guest wrote")
        _bind(path, origin)
        has_reserve = (path / RESERVE_NAME).exists()
    except OSError as error:
        raise StoreError(f"cannot look into the state folder {path}: {error.strerror}") from error
    state = open_files(path, origin, lock_fd, private=private)
    if has_reserve:
        state.reserve = reserve.go_on_with(path)
    return state


def end_run(path: Path, lock_fd: int) -> None:
    """What its daemon does at the end of a run, of one that ended while it had none: all is synced, and noted as whole.
    `lock_fd`: a copy of the folder's lock, which stays the caller's.

    Raises:
        StoreError: the disk refused; what was synced before counts.
    """
    record = folders.maybe_record(path / META_NAME)
    if record is None or record.get("whole") or not folders.still_locked(lock_fd):
        return  # its daemon did it itself, and another mount may have it by now
    try:
        origin = RamOrigin(bytes.fromhex(record["identity"]), record["size_bytes"], None)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path / META_NAME} is damaged") from error
    copy = -1
    try:
        copy = os.dup(lock_fd)
        state = open_files(path, origin, copy, private=False)
    except (OSError, StoreError) as error:
        if copy >= 0:
            os.close(copy)
        raise StoreError(f"cannot open {path}: {error}") from error
    try:
        state.sync_now()
        state.note_whole()
    finally:
        state.close()


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


def _bind(path: Path, origin: RamOrigin) -> dict[str, Any]:
    """Check the record, or write it into a folder that has none. Returns it. (Durable it is before pages are.)"""
    meta = path / META_NAME
    wanted = {
        "format": FORMAT,
        "version": VERSION,
        "identity": origin.identity.hex(),
        "size_bytes": origin.size_bytes,
    }
    if not meta.exists():
        try:
            folders.write_record(meta, wanted, durable=False)
        except OSError as error:
            raise StoreError(f"cannot write {meta}: {error.strerror}") from error
        return wanted
    try:
        record = folders.read_record(meta)
    except OSError as error:
        raise StoreError(f"the disk does not give {meta} back: {error.strerror}") from error
    if record is None or record.get("format") != FORMAT:
        raise StoreError(f"{meta} is damaged or not a state folder's")
    if record.get("version") != VERSION:
        raise StoreError(f"{meta} has version {record.get('version')!r}, this lazymem knows {VERSION}")
    if {name: record.get(name) for name in wanted} != wanted:
        raise IdentityError(
            f"the state folder {path} belongs to another snapshot ({str(record.get('identity'))[:16]}...)"
            f" than the one mounted ({origin.identity.hex()[:16]}...): name another folder"
        )
    return record


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
    except OSError:  # its own mount was faster, or the disk does not say
        return False


def _is_own(name: str) -> bool:
    return name in _OWN_NAMES or name.startswith(f".{META_NAME}.")
