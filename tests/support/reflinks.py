"""A file system with reflinks, on a loop device; where on it a file's pages are; what stands in where there is none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazymem.pages import PAGE_SIZE
from tests.support.privileges import maybe_as_root

_IMAGE_BYTES = 1 << 30
"""Sparse; more than all that the tests write."""

_STEP_BYTES = 8 << 20

_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
_SYNC = 1
_HEAD_BYTES, _EXTENT_BYTES = 32, 56
_EXTENTS = 512
_LAST = 0x1
_NO_PLACE = 0x2 | 0x4 | 0x8 | 0x200
"""Unknown, not allocated yet, compressed, or inside the metadata: then the offset on the disk means nothing."""


class NoLoopDeviceError(Exception):
    """No file system can be mounted here: no root, no loop device (a container), or a kernel without btrfs."""


@contextlib.contextmanager
def reflink_disk(folder: Path) -> Iterator[Path]:
    """A mounted btrfs of our own in the new folder `folder`, which this user may write; gone at the end.

    The loop device is freed by the kernel with its last user, so an unmount is all there is to clean up.
    """
    image, disk = folder / "image", folder / "disk"
    disk.mkdir(parents=True)
    with image.open("xb") as file:
        file.truncate(_IMAGE_BYTES)
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, env={**os.environ, "PATH": path})
    _as_root("mount", "-t", "btrfs", "-o", "loop", str(image), str(disk))
    try:
        _as_root("chown", f"{os.geteuid()}:{os.getegid()}", str(disk))
        yield disk
    finally:
        try:
            _as_root("umount", str(disk))
        except NoLoopDeviceError:
            # Something still has a file open there: it goes with that.
            _as_root("umount", "--lazy", str(disk))
            raise
        image.unlink()


def _as_root(*command: str) -> None:
    root = maybe_as_root()
    if root is None:
        raise NoLoopDeviceError("neither root nor a sudo without a password")
    done = subprocess.run([*root, *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoLoopDeviceError(f"{command[0]}: {done.stderr.strip()}")


def stored_pages(path: Path) -> set[tuple[int, int]]:
    """(offset in the file, offset on the disk) of every 4 KiB that the file has there. Files with a reflink between
    them have such pairs in common.

    By FIEMAP (linux/fiemap.h), as `filefrag -v` asks; what is still in memory only is written out first.
    """
    found: set[tuple[int, int]] = set()
    start = 0
    with path.open("rb") as file:
        while True:
            request = bytearray(_HEAD_BYTES + _EXTENT_BYTES * _EXTENTS)
            struct.pack_into("<QQIIII", request, 0, start, 2**64 - 1 - start, _SYNC, 0, _EXTENTS, 0)
            fcntl.ioctl(file, _FIEMAP, request)
            (count,) = struct.unpack_from("<20xI", request)
            for number in range(count):
                extent = struct.unpack_from("<QQQ16xI", request, _HEAD_BYTES + _EXTENT_BYTES * number)
                logical, physical, length, flags = extent
                assert not flags & _NO_PLACE, f"an extent that is nowhere on the disk: {flags:#x}"
                found |= {(logical + at, physical + at) for at in range(0, length, PAGE_SIZE)}
                start = logical + length
            if not count or flags & _LAST:
                return found


class CloneStandIn:
    """FICLONE on any file system, by a copy: below `folder` it succeeds, into and out of it it does not, as on others.

    `digests`: of each file that was made so, by its inode.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ioctl = fcntl.ioctl
        self.digests: dict[int, str] = {}

    def ioctl(self, file: Any, request: int, *arguments: Any) -> Any:
        """Instead of `fcntl.ioctl`."""
        if request != _FICLONE:
            return self._ioctl(file, request, *arguments)
        (source,) = arguments
        if not all(Path(f"/proc/self/fd/{each}").resolve().is_relative_to(self._folder) for each in (file, source)):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        os.ftruncate(file, os.fstat(source).st_size)
        for at in range(0, os.fstat(source).st_size, _STEP_BYTES):
            os.pwrite(file, os.pread(source, _STEP_BYTES, at), at)
        self.digests[os.fstat(file).st_ino] = digest(Path(f"/proc/self/fd/{file}"))
        return 0


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def clone_stand_in(folder: Path) -> Iterator[CloneStandIn]:
    with pytest.MonkeyPatch.context() as patch:
        stand_in = CloneStandIn(folder.resolve())
        patch.setattr(fcntl, "ioctl", stand_in.ioctl)
        yield stand_in
