"""A file system with reflinks, on a loop device; and where on it a file's pages are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lazymem.pages import PAGE_SIZE
from tests.support.privileges import maybe_as_root

_IMAGE_BYTES = 1 << 30
"""Sparse; more than all that the tests write."""

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
