"""Small disks that a test fills up: ext4 on a loop device; where there is none, memory of a fixed size stands in."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.nowait import lies_in_memory
from tests.support.skips import stood_in
from tests.support.vmprocess import WAIT_SECONDS

_STEPS_BYTES = (1 << 20, 64 << 10, 4 << 10)


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int, test: pytest.Item) -> Iterator[Path]:
    """A file system of that size (journal and all) in the new folder `folder`; for tests that are root. No block of it
    is kept back for root. Gone at the end."""
    image, disk = folder / "image", folder / "disk"
    disk.mkdir(parents=True)
    _mount(image, disk, size_bytes, test)
    try:
        yield disk
    finally:
        _unmount(disk)
        image.unlink(missing_ok=True)


def _mount(image: Path, disk: Path, size_bytes: int, test: pytest.Item) -> None:
    with image.open("xb") as file:
        file.truncate(size_bytes)
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    make = ["mkfs.ext4", "-q", "-m", "0"]
    subprocess.run([*make, image], check=True, capture_output=True, env={**os.environ, "PATH": path})
    done = subprocess.run(["mount", "-o", "loop", image, disk], capture_output=True, text=True, check=False)
    if done.returncode:
        stood_in(test, "memory of a fixed size, for a small ext4: root may not mount one here")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "tmpfs", disk], check=True)


def mount_again(disk: Path) -> None:
    """As after a crash, with whatever its journal knows. Memory stays as it is."""
    if lies_in_memory(disk.stat().st_dev):
        return
    _unmount(disk)
    subprocess.run(["mount", "-o", "loop", disk.with_name("image"), disk], check=True)


def _unmount(disk: Path) -> None:
    give_up = time.monotonic() + WAIT_SECONDS
    while subprocess.run(["umount", disk], capture_output=True, check=False).returncode:
        if time.monotonic() > give_up:
            subprocess.run(["umount", "-l", disk], check=True)
            raise AssertionError(f"somebody still has a file open on {disk}")
        time.sleep(0.05)  # a daemon that was killed lets go of its files a moment later


def fill_up(path: Path) -> None:
    """The new file `path` takes all room that there is."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        at = 0
        for step in _STEPS_BYTES:
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(fd, at, step)
                    at += step
        os.fsync(fd)
    finally:
        os.close(fd)
