"""Folders and files of the store on disk: private (0700, 0600), ours, of exactly the size they must have. Blocking."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazymem.errors import StoreError

FOLDER_MODE = 0o700
FILE_MODE = 0o600

MAX_RECORD_BYTES = 64 * 1024
"""A meta record has a few hundred bytes; more is not ours."""


def ensure_folder(path: Path) -> None:
    """Make `path` and what is missing above it, private.

    Raises:
        StoreError: it cannot be made, or is no folder.
    """
    try:
        for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
            make_folder(missing)
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)  # says so when it is there and no folder
    except OSError as error:
        raise StoreError(f"cannot make the folder {path}: {error.strerror}") from error


def make_folder(path: Path) -> None:
    """A new folder, private whatever the umask takes away; one that somebody else made meanwhile is left as it is.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(mode=FOLDER_MODE)
    except FileExistsError:
        return
    path.chmod(FOLDER_MODE)


def make_private(path: Path) -> None:
    """Take a folder of ours from the eyes of others, who made it or not.

    Raises:
        StoreError: the disk refused.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) != FOLDER_MODE:
            path.chmod(FOLDER_MODE)
    except OSError as error:
        raise StoreError(f"cannot make the folder {path} private: {error.strerror}") from error


def why_not_ours(path: Path) -> str | None:
    """A reason not to believe what is in folder `path`, or None. A folder that others can write to is not believed."""
    try:
        status = path.lstat()
    except OSError as error:
        return str(error.strerror)
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return "others can write to it"
    return None


def create_file(path: Path, size_bytes: int) -> None:
    """A new sparse file. OSError where that fails or it exists."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        os.fchmod(fd, FILE_MODE)  # whatever the umask took away
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def open_file(path: Path, size_bytes: int) -> int:
    """Descriptor, read and write, of a regular file of ours with exactly that size.

    Raises:
        StoreError: it is anything else.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise StoreError(f"cannot open {path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
    except OSError as error:
        os.close(fd)
        raise StoreError(f"cannot look at {path}: {error.strerror}") from error
    reason = None
    if not stat.S_ISREG(status.st_mode):
        reason = "is not a plain file"
    elif status.st_uid != os.geteuid() or status.st_mode & 0o022:
        reason = "belongs to others, or they can write to it"
    elif status.st_size != size_bytes:
        reason = f"has {status.st_size} bytes, not {size_bytes}"
    if reason:
        os.close(fd)
        raise StoreError(f"{path} {reason}")
    return fd


def write_record(path: Path, record: dict[str, Any], *, durable: bool = True) -> None:
    """Put a JSON record in place of `path`, whole or not at all; if `durable` also after a crash of the host, which
    costs a wait for the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        os.fchmod(fd, FILE_MODE)
        os.write(fd, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    if durable:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """The names in it reach the disk. OSError where the disk refuses."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def maybe_record(path: Path) -> dict[str, Any] | None:
    """The JSON record in `path`; None if there is none, something else is there, or it cannot be read."""
    try:
        return read_record(path)
    except OSError:
        return None


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON record in `path`; None if there is none, or something else is there. OSError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def maybe_lock(path: Path) -> int | None:
    """Descriptor of the file `path` (made if missing) with its exclusive flock, which ends with the process; None if
    somebody else has it.

    Raises:
        StoreError: it cannot be opened, or locked.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    except OSError as error:
        raise StoreError(f"cannot open {path}: {error.strerror}") from error
    try:
        os.fchmod(fd, FILE_MODE)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise StoreError(f"cannot lock {path}: {error.strerror}") from error
    return fd


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Blocking: one process, and one thread of it, at a time for as long as this lasts. False: a file system that knows
    no locks, or a folder that is gone, has none."""
    is_locked = False
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(_let_go, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
            is_locked = True
        yield is_locked


def _let_go(fd: int) -> None:
    """Of a lock, also in a process that was forked meanwhile. What was done under it stands, whatever the disk says."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        os.close(fd)


def still_locked(fd: int) -> bool:
    """Whether a copy of a descriptor of `maybe_lock` has the lock, or has it again: nobody took it meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_folder(path: Path) -> None:
    """Remove a folder of ours and all in it; what cannot be removed stays."""
    shutil.rmtree(path, ignore_errors=True)
