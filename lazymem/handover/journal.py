"""A side's decision on the disk: written whole or not at all, and there before anybody acts on it. Blocking.

One file of two slots that are written in turn, each with a digest over it: a write that is cut leaves the other slot.
Both are there from the start, synced together with their folder, so a decision is an overwrite of blocks that the file
has already, and fdatasync(2) waits for no other file's data (the guest's RAM file may lie on the same disk, with
gigabytes unwritten).
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import time
from pathlib import Path
from typing import Any, Self

from blake3 import blake3
from msgspec import Struct, convert

from lazymem.errors import BusyError, StoreError

FORMAT = "lazymem-handover"
VERSION = 1

NAME = "decision"
_LOCK_NAME = "lock"

_SLOT_BYTES = 16 * 1024
"""A record has some paths and numbers, under 2 KiB."""

_DIGEST_BYTES = 32

_LOCK_SECONDS = 1.0
"""For a process that ends, or only looks whether somebody has it (`is_held`), to be gone from it: milliseconds, unless
the host is so busy that it is put aside just then."""

_LOCK_POLL_SECONDS = 0.005


class Record(Struct, frozen=True):
    """What a restarted process needs. `state`: a recorded state's value; `details`: this side's own, JSON."""

    role: str
    handover: str
    state: str
    details: dict[str, Any]


class Journal:
    """The folder of one hand-over's one side, locked while this is open.

    Raises:
        BusyError: another process has it.
        StoreError: it cannot be made or read, or others could write to it.
    """

    def __init__(self, folder: Path, role: str) -> None:
        self.folder = folder
        self._role = role
        self._sequence = 0
        self.write_seconds = math.inf
        """The shortest time that a write took."""
        self._file = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_ours(folder)
            self._lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"cannot keep a decision in {folder}: {error.strerror}") from error
        try:
            self._take_lock()
            self.found = found = self._open()
            if found is not None:
                # What a write left that the disk refused is read all the same, out of the kernel's memory.
                self._sequence -= 1
                self.write(found.handover, found.state, found.details)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BusyError(f"another process is at this hand-over ({self.folder})") from error
                time.sleep(_LOCK_POLL_SECONDS)
            except OSError as error:
                raise StoreError(f"cannot lock {self.folder / _LOCK_NAME}: {error.strerror}") from error
            else:
                return

    def _open(self) -> Record | None:
        path = self.folder / NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if os.fstat(self._file).st_size < 2 * _SLOT_BYTES:
                os.pwrite(self._file, bytes(2 * _SLOT_BYTES), 0)
            os.fsync(self._file)
            _sync(self.folder)
            _sync(self.folder.parent)
            slots = _slots(os.pread(self._file, 2 * _SLOT_BYTES, 0))
        except OSError as error:
            raise StoreError(f"cannot keep a decision in {path}: {error.strerror}") from error
        except StoreError as error:
            raise StoreError(f"{path}: {error}") from error
        if not slots:
            return None
        self._sequence, record = max(slots, key=lambda slot: slot[0])
        if record.role != self._role:
            raise StoreError(f"{self.folder} is the {record.role}'s of a hand-over, not the {self._role}'s")
        return record

    def write(self, handover: str, state: str, details: dict[str, Any]) -> Record:
        """On the disk when this returns.

        Raises:
            StoreError: the disk refused; the decision before it stands.
        """
        began = time.monotonic()
        record = self.note(handover, state, details)
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._not_written(error) from error
        self._sequence += 1
        self.write_seconds = min(self.write_seconds, time.monotonic() - began)
        return record

    def note(self, handover: str, state: str, details: dict[str, Any]) -> Record:
        """The same for other processes alone: a host that crashes may find the decision before it. The next one takes
        its place, so the one before it stands on the disk until that is there.

        Raises:
            StoreError: it could not be; the decision before it stands.
        """
        record = Record(self._role, handover, state, details)
        sequence = self._sequence + 1
        text = _encode(sequence, record)
        try:
            if os.pwrite(self._file, text.ljust(_SLOT_BYTES, b"\0"), sequence % 2 * _SLOT_BYTES) != _SLOT_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._not_written(error) from error
        return record

    def _not_written(self, error: OSError) -> StoreError:
        return StoreError(f"cannot write a decision to {self.folder / NAME}: {error.strerror}")

    def close(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: Path) -> Record | None:
    """What stands in a journal that another process may have open; None where there is none."""
    try:
        slots = _slots((folder / NAME).read_bytes()[: 2 * _SLOT_BYTES])
    except OSError:
        return None
    return max(slots, key=lambda slot: slot[0])[1] if slots else None


def is_held(folder: Path) -> bool:
    """Whether a process has this journal open now, or may have."""
    try:
        descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def default_folder(role: str, name: str) -> Path:
    """Where a side keeps its decision when nobody says: the same for the same `name` (a monitor, a mount point)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        home = os.environ.get("HOME", "")
        base = os.path.join(home, ".local/state") if home.startswith("/") else "/var/lib"
    return Path(base, "lazymem", f"{role}-{blake3(os.fsencode(name)).hexdigest(8)}")


def _encode(sequence: int, record: Record) -> bytes:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "sequence": sequence,
        "role": record.role,
        "handover": record.handover,
        "state": record.state,
        "details": record.details,
    }
    text = json.dumps(document).encode()
    whole = blake3(text).digest(_DIGEST_BYTES) + text
    if len(whole) > _SLOT_BYTES:
        raise StoreError(f"a hand-over's record has {len(text)} bytes, more than fit: name shorter paths and options")
    return whole


def _slots(data: bytes) -> list[tuple[int, Record]]:
    """Those that are whole, of which a write that was cut leaves one at least, or none was ever written.

    Raises:
        StoreError: both are damaged, and nobody knows what was decided.
    """
    found = []
    damaged = 0
    for start in (0, _SLOT_BYTES):
        # A digest may begin and end with zeros, the text never ends with one.
        slot = data[start : start + _SLOT_BYTES].rstrip(b"\0")
        text = slot[_DIGEST_BYTES:]
        if not text or blake3(text).digest(_DIGEST_BYTES) != slot[:_DIGEST_BYTES]:
            damaged += bool(slot)
            continue
        found.append(_read_slot(text))
    if damaged == 2:
        raise StoreError("a hand-over's record is damaged: see on which side the guest runs, then remove it")
    return found


def _read_slot(text: bytes) -> tuple[int, Record]:
    """A slot's sequence and record. Its digest was right, so whatever is wrong with it was written so."""
    try:
        document = json.loads(text)
        version = document["version"]
        if version == VERSION:
            return convert(document["sequence"], int), convert(document, Record)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"a hand-over's record makes no sense: {error}") from error
    raise StoreError(f"a hand-over's record has version {version!r}, this lazymem knows {VERSION}")


def _check_ours(folder: Path) -> None:
    """Who can write here decides where a guest runs."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{folder} is not a folder")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StoreError(f"{folder} belongs to others, or they can write to it: name another one")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
