"""Opens the files of a snapshot folder: regular ones only, with one line for each that is missing or something else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lazymem.errors import SnapshotError
from lazymem.snapshot import manifest as manifests
from lazymem.snapshot.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest


def check_folder(folder: Path) -> None:
    """Raises SnapshotError for what is no folder."""
    if not os.path.isdir(folder):  # not Path's: that raises for a name that is too long
        raise SnapshotError(f"{folder} is not a folder" if os.path.exists(folder) else f"{folder} does not exist")


def open_regular(path: Path) -> int:
    """A descriptor of the file at `path`, for reading.

    Raises:
        SnapshotError: there is none, or it is something else, or may not be read.
    """
    found = maybe_open_regular(path)
    if found is None:
        raise SnapshotError(f"{path.parent} is not a snapshot: it has no {path.name}")
    return found


def maybe_open_regular(path: Path) -> int | None:
    """As `open_regular`; None where there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang the open
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotError(f"cannot open {path}: {error.strerror}") from error
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        os.close(fd)
        raise SnapshotError(f"cannot look at {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise SnapshotError(f"{path} is not a regular file")
    return fd


def manifest_bytes(folder: Path) -> bytes:
    """manifest.json's bytes, empty if there is none; one byte more than allowed at most, for `parse` to refuse."""
    path = folder / MANIFEST_NAME
    fd = maybe_open_regular(path)
    if fd is None:
        return b""
    with os.fdopen(fd, "rb") as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if not text:
        raise SnapshotError(f"{path} is empty")
    return text


def maybe_manifest_in(folder: Path) -> Manifest | None:
    """The manifest of the snapshot `folder`; None where it has none.

    Raises:
        SnapshotError: it is broken.
    """
    text = manifest_bytes(folder)
    return manifests.parse(text) if text else None
